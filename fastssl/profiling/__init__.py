"""`fastssl profile`: how fast each stage of training is, which one is the bottleneck, and how to fix it.

profiler.py      the order in which a run is measured, and the profile that it makes
timing.py        how a stage is timed; storage.py, loader_stages.py, device_stages.py, end_to_end.py: the stages
machine.py       measured peaks of this machine; peaks.py: peaks from data sheets
resources.py     the cost model: which resource sets the pace; bottleneck.py: the sentence
planner.py       predicts another machine
result.py        profile.json; compare.py: two of them; tables.py, plots.py, page.py, trace.py: renderings
"""

from fastssl.profiling.compare import compare_table
from fastssl.profiling.planner import check_batch_size, parse_machine, plan_table, plan_training
from fastssl.profiling.profile import Profile, read_profile
from fastssl.profiling.profiler import default_path, profile_recipe, trace_path, write_files
from fastssl.profiling.tables import profile_table
from fastssl.profiling.thresholds import failed_thresholds, parse_thresholds

__all__ = [
    "Profile", "check_batch_size", "compare_table", "default_path", "failed_thresholds", "parse_machine",
    "parse_thresholds", "plan_table", "plan_training", "profile_recipe", "profile_table", "read_profile", "trace_path",
    "write_files",
]  # fmt: skip
