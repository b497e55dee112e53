"""The order in which test files run."""

# Files of ten seconds or more, longest first: with a file for each process in turn, two processes
# then end at nearly the same time. `test_cli` trains the chain that later files read, and
# `test_hosts`, which mostly waits, runs beside it.
LONG_FILES = (
    "distributed/test_hosts.py",
    "cli/test_cli.py",
    "compare/test_compare.py",
    "evaluate/test_benchmarks.py",
    "distributed/test_devices.py",
    "test_bad_input.py",
    "docs/test_site.py",
    "train/test_loop.py",
    "train/test_gs.py",
    "train/test_public_models.py",
    "plan/test_plan.py",
    "data/test_pipeline.py",
    "inspect/test_check.py",
    "stages/test_feature_cache.py",
    "weights/test_language.py",
    "hub/test_load.py",
    "stages/test_old_run.py",
    "stages/test_flops.py",
    "compare/test_train.py",
)
