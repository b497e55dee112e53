"""The benchmark of intervals measures the scores of both tasks."""

import json

from benches.bench_intervals import main


def test_both_tasks_are_scored_with_intervals(capsys):
    main(["--captions=4", "--answers=3"])
    captions, answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert (captions["items"], answers["items"]) == (4, 15)
    assert captions["with_interval"] == ["bleu4", "cider", "rouge_l"]
    assert {"accuracy", "accuracy_yes/no", "accuracy_lavis"} <= set(answers["with_interval"])
    for record in (captions, answers):
        assert all(record[what] >= 0 for what in ("scores", "intervals", "paired"))
        assert record["intervals"] > 0
