"""Compile Triton kernels for GPUs that are not there, with the ptxas that Triton brings, and count what comes out."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class MachineCode(NamedTuple):
    """What one thread of a kernel executes and holds."""

    instructions: Counter[str]  # by opcode, of all branches
    registers: int
    stack_bytes: int  # 0: no register was spilled

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or any(opcode in self.instructions for opcode in ("LDL", "STL"))


def compile_kernel(kernel, types: dict[str, str], constants: dict[str, object], capability: int) -> MachineCode:
    """Compile a kernel as a launch would.

    types: of the arguments that are no constants, as Triton writes them: "*fp16", "i32". Pointers and sizes divide by
    16, as those of our tensors do. capability: 90 for sm_90.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] in ALIGNED}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read_machine_code(compiled.asm["cubin"])


ALIGNED = ("*u8", "*fp16", "*bf16", "*fp32", "*i64", "i32")


def read_machine_code(cubin: bytes) -> MachineCode:
    def run(tool: str, *options: str) -> str:
        path = f"/proc/self/fd/{file}"
        done = subprocess.run(
            [TOOLS / tool, *options, path], capture_output=True, text=True, pass_fds=[file], check=True
        )
        return done.stdout

    file = os.memfd_create("kernel.cubin")
    os.write(file, cubin)
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", run("nvdisasm", "-c"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", run("cuobjdump", "--dump-resource-usage")).groups()
    os.close(file)
    return MachineCode(Counter(line for line in lines if line != "NOP"), int(registers), int(stack))
