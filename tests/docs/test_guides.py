"""The guides: every command parses, what can run here runs, every link leads somewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import guides
from support.clips import clip, image
from support.paths import ROOT

from vadapter.cli.main import main
from vadapter.config import load

HEADINGS = (
    "Install", "Quickstart", "The method", "Compare", "Results", "Your models", "Your data",
    "Evaluate", "Scale", "Code", "Links",
)  # fmt: skip
LINES = 170
TEXTS = guides.guides()
COMMANDS = [
    pytest.param(command, id=f"{name}: {' '.join(command)[:60]}")
    for name in TEXTS
    for block in guides.blocks(guides.read(name), "bash")
    for command in guides.commands(block)
]
VADAPTER = [p for p in COMMANDS if Path(p.values[0][0]).name == "vadapter"]
LAUNCHERS = [p for p in COMMANDS if p.values[0][0].startswith("launch/")]


def test_the_readme_is_short_and_in_order():
    text = guides.read("README.md")
    assert len(text.splitlines()) <= LINES
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == HEADINGS
    figures = re.findall(r"!\[[^]]{20,}\]\((docs/figures/\w+\.svg)\)", text)
    assert figures == ["docs/figures/architecture.svg", "docs/figures/convergence.svg"]


def test_commands_are_found_in_every_kind_of_guide():
    assert len(VADAPTER) > 25
    assert len(LAUNCHERS) > 6


@pytest.mark.parametrize("command", VADAPTER)
def test_every_command_parses(command, monkeypatch, capsys):
    """Each with an option that does not exist is refused for that option alone."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*command[1:], "--no-such-option"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --no-such-option\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", VADAPTER)
def test_every_recipe_and_override_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipes = [
        word.removeprefix("--config=")
        for word in command
        if re.match(r"(--config=)?configs/", word)
    ]
    for recipe in recipes:
        values = load(recipe)
        for word in command:
            if word.startswith("--config."):
                group = word.removeprefix("--config.").split(".")[0].split("=")[0]
                places = [values, *values.get("arms", {}).values()]  # of a comparison
                assert any(group in place for place in places)


@pytest.mark.parametrize("command", LAUNCHERS)
def test_every_launcher_prints_what_it_would_run(command):
    script, *options = command
    verbs = options[:1] if script.endswith("tpu_vm.sh") else []
    words = [script, *verbs, "--dry-run", *options[len(verbs) :]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture(scope="module")
def folder(chain, tmp_path_factory):
    """Where a newcomer is after the quickstart: runs/quickstart, photo.jpg and clip.mp4."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(chain / "run", folder / "runs" / "quickstart")
    shutil.copy(chain / "shapes" / "00.png", folder / "photo.jpg")
    (folder / "clip.mp4").write_bytes(clip([image(i) for i in range(10)]))
    return folder


def test_the_sixty_seconds_of_use_run_as_they_are_printed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    text = guides.section("README.md", "Quickstart")
    quickstart, use = guides.blocks(text, "bash")
    assert guides.commands(quickstart) == [[".venv/bin/vadapter", "quickstart"]]
    verbs = []
    for _, *command in guides.commands(use):
        verbs.append(command[0])
        assert main(command) == 0, capsys.readouterr().err
    assert verbs == ["caption", "ask", "eval", "export"]
    printed = capsys.readouterr().out
    assert "photo.jpg: " in printed
    assert "clip.mp4: " in printed

    (code,) = guides.blocks(text, "python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    caption, answer = done.stdout.splitlines()
    assert f"photo.jpg: {caption}\n" in printed
    assert answer


def anchors(path: Path) -> set[str]:
    """Return the anchors that a Markdown file's headings get."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", guides.read(name))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (TEXTS[name].parent / path).resolve() if path else TEXTS[name]
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}"


@pytest.mark.parametrize("name", TEXTS)
def test_every_named_path_exists(name):
    named = re.findall(
        r"`((?:vadapter|configs|launch|tests|docs|benches)/[\w/.]*\w)`", guides.read(name)
    )
    for path in named:
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_the_figures_are_what_the_script_draws(tmp_path):
    script = ROOT / "docs" / "figures" / "draw.py"
    subprocess.run([sys.executable, script, f"--out={tmp_path}"], cwd=ROOT, check=True, timeout=120)
    for name in ("architecture.svg", "convergence.svg"):
        drawn = (tmp_path / name).read_text()
        kept = (script.parent / name).read_text()
        assert drawn.count("<path") == kept.count("<path") > 10
