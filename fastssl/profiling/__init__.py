"""`fastssl profile`: how fast each stage of training is, which one is the bottleneck, and how to fix it.

profiler.py      measures all stages of a run and makes the profile
timing.py        how a stage is timed; storage.py, loader_stages.py, device_stages.py, end_to_end.py: the stages
peaks.py         peak rates of GPUs and storage, from data sheets or measured
bottleneck.py    the cost model, and the sentence that names the bottleneck and its fixes
planner.py       predicts training on another machine
profile.py       the typed profile and profile.json; compare.py: two of them; thresholds.py: --fail-under
tables.py, plots.py, page.py, trace.py    the profile on a terminal, as a figure, as an HTML page; a trace of steps
"""

from fastssl.profiling.compare import compare_table
from fastssl.profiling.planner import check_batch_size, check_planned_recipe, parse_machine, plan_table, plan_training
from fastssl.profiling.profile import Profile, read_profile
from fastssl.profiling.profiler import default_path, profile_recipe, trace_path, write_files
from fastssl.profiling.tables import profile_table
from fastssl.profiling.thresholds import failed_thresholds, parse_thresholds

__all__ = [
    "Profile", "check_batch_size", "check_planned_recipe", "compare_table", "default_path", "failed_thresholds",
    "parse_machine", "parse_thresholds", "plan_table", "plan_training", "profile_recipe", "profile_table",
    "read_profile", "trace_path", "write_files",
]  # fmt: skip
