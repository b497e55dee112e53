"""The benchmark of loading runs all sides on one checkpoint, and they hold the same bytes."""

import pytest

from benches.bench_load import main, measure, write


@pytest.mark.slow  # transformers takes seconds to import, in four processes
def test_every_side_is_measured(tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs the extra parity")
    main(["--gigabytes=0.01", "--rounds=1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        [dtype, side] for dtype in ("bfloat16", "float32") for side in ("ours", "mapped", "read")
    ]
    folder = write(tmp_path, 0.01)
    sizes = {
        side: measure(side, folder)["shards"] for side in ("ours", "mapped", "read", "library")
    }
    assert len(set(sizes.values())) == 1
