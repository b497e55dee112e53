"""The order in which test files run."""

# Files of ten seconds or more, longest first: with a file for each process in turn, two processes
# then end at nearly the same time. `test_cli` trains the chain that later files read, and
# `test_hosts`, which mostly waits, runs beside it.
LONG_FILES = (
    "distributed/test_hosts.py",
    "cli/test_cli.py",
    "plan/test_plan.py",
    "distributed/test_devices.py",
    "evaluate/test_benchmarks.py",
    "docs/test_guides.py",
    "docs/test_site.py",
    "train/test_gs.py",
    "inspect/test_check.py",
    "train/test_public_models.py",
    "hub/test_api.py",
    "weights/test_language.py",
    "train/test_loop.py",
    "test_bad_input.py",
    "hub/test_load.py",
    "hub/test_push.py",
    "hub/test_export.py",
    "stages/test_feature_cache.py",
    "data/test_pipeline.py",
    "weights/test_hub.py",
    "stages/test_steps.py",
    "plan/test_flops.py",
    "stages/test_old_run.py",
    "evaluate/test_few_shot.py",
    "distributed/test_collectives.py",
    "distributed/test_device_memory.py",
    "models/test_adapter_model.py",
    "train/test_rewind.py",
)
