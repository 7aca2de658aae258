"""Shared by all folders; imports nothing else of fastssl.

errors.py       the exceptions that end a command, and exit codes
files.py        atomic writes
terminal.py     console, tables, progress
system.py       CPU, cores, memory
environment.py  command, versions and machine of this process, as recorded in results
compiled.py     numba functions whose machine code is cached
distributed.py  ranks, process groups, collectives
randomness.py   counter-based random numbers
geometry.py     crop boxes
"""
