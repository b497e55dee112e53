"""Speed beside PyTorch in one run: `python -m benches.peer --help`; needs the extra `parity`.

Read `rows` (what is measured), then the file of a row's kind (how), `torch_model` (the other side)
and `measure` (the clock). Each row runs in a process of its own, pinned to as many cores as it has
threads, in which both sides take turns: what else the machine does meets both alike.
"""
