"""The order in which test files run."""

# Files of ten seconds or more, longest first: with a file for each process in turn, two processes
# then end at nearly the same time. `test_cli` trains the chain that later files read, and
# `test_hosts`, which mostly waits, runs beside it.
LONG_FILES = (
    "distributed/test_hosts.py",
    "cli/test_cli.py",
    "compare/test_compare.py",
    "docs/test_site.py",
    "distributed/test_devices.py",
    "evaluate/test_benchmarks.py",
    "plan/test_plan.py",
    "stages/test_flops.py",
    "models/adapters/test_all_connectors.py",
    "models/adapters/test_cross_attention.py",
    "test_ablations.py",
    "test_bad_input.py",
    "inspect/test_inspect.py",
    "train/test_gs.py",
    "train/test_public_models.py",
    "stages/test_old_run.py",
    "models/adapters/test_qformer.py",
    "models/test_adapter_model.py",
    "models/test_lm.py",
    "data/test_pipeline.py",
    "models/test_beam.py",
    "weights/test_language.py",
    "stages/test_steps.py",
    "models/test_fused_attention.py",
    "inspect/test_check.py",
    "hub/test_load.py",
    "stages/test_feature_cache.py",
    "stages/test_restore.py",
    "models/test_shapes.py",
    "models/adapters/test_words.py",
)
