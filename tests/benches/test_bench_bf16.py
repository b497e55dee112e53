"""The benchmark of bfloat16 products runs, and prints every formulation."""

from benches import bench_bf16


def test_every_formulation_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench_bf16, "L", 1)
    monkeypatch.setattr(bench_bf16, "OPTIONS", {"default": {}})
    bench_bf16.main(["--rows=2", "--rounds=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 rows"
    for form in bench_bf16.FORMS:
        assert sum(f"bfloat16, {form}, default" in line for line in lines) == 1
        assert sum(f"float32, {form}, default" in line for line in lines) >= 1
