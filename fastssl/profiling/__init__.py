"""How fast is every arrow of the data's flow, which one is the limit, and what would lift it: `fastssl profile`.

command.py       the order of measuring, and what is made of it
windows.py       how a leg is timed; storage.py, loader_legs.py, device_legs.py, end_to_end.py: the legs
machine.py       measured peaks; peaks.py: those of data sheets
limits.py        arithmetic on the legs' costs: which resource sets the pace; verdict.py: the sentence
plan.py          another machine, predicted
result.py        profile.json; compare.py: two of them; tables.py, pictures.py, page.py, trace.py: to look at
"""

from fastssl.profiling.compare import compare_table
from fastssl.profiling.planner import plan, plan_table, read_plan, require_equal_shares
from fastssl.profiling.profiler import place_of, profile, trace_beside, write_all
from fastssl.profiling.result import check_thresholds, read_profile, read_thresholds
from fastssl.profiling.tables import profile_table

__all__ = [
    "check_thresholds", "compare_table", "place_of", "plan", "plan_table", "profile", "profile_table", "read_plan",
    "read_profile", "read_thresholds", "require_equal_shares", "trace_beside", "write_all",
]  # fmt: skip
