"""The steps of action.yml and the GitLab job, as they are written, where there is no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import gated
import pytest
import tiny
import yaml
from packaging.requirements import Requirement

from safegene_runtime.gating.verdict import EXIT_INVALID_RECORD, EXIT_USAGE, Verdict

ACTION = yaml.safe_load((tiny.REPOSITORY / "action.yml").read_text())
GITLAB = yaml.safe_load((tiny.REPOSITORY / "examples" / "ci" / "gitlab-ci.yml").read_text())
PROJECT = tomllib.loads((tiny.REPOSITORY / "pyproject.toml").read_text())["project"]
BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]


@pytest.fixture(scope="module")
def made() -> gated.Gated:
    return gated.make()


@pytest.fixture(scope="module")
def python(made: gated.Gated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of safegene[gguf]: the distributions it declares and theirs, no others."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    links = folder / "links"
    links.mkdir()
    for name in _closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gguf"]]):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (links / top).exists():
                (links / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    paths = [links, made.site, tiny.REPOSITORY / "runtime", tiny.REPOSITORY / "converter"]
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (packages / "safegene.pth").write_text("".join(f"{path}\n" for path in paths))
    return folder / "venv" / "bin" / "python"


def _closure(requirements: list[str]) -> set[str]:
    found: set[str] = set()
    todo = [Requirement(one) for one in requirements]
    while todo:
        one = todo.pop()
        if one.name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(one.name)
        todo += [Requirement(text) for text in metadata.requires(one.name) or ()]
    return found


class Runner:
    """As much of GitHub's runner as a composite action of `run` steps needs."""

    def __init__(
        self, folder: Path, python: Path, inputs: dict[str, str], source: Path = tiny.REPOSITORY
    ) -> None:
        self.source = source
        self.inputs = {name: one.get("default", "") for name, one in ACTION["inputs"].items()}
        self.inputs |= {"python": str(python), **inputs}
        self.folder = folder
        for name in ("env", "output", "summary"):
            (folder / name).touch()
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "RUNNER_TEMP": str(folder),
            "GITHUB_ENV": str(folder / "env"), "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary"), "SAFEGENE_INSTALL": "skip",
        }  # fmt: skip

    def run(self) -> subprocess.CompletedProcess[str]:
        """The first step that fails, or the last one."""
        for number, step in enumerate(ACTION["runs"]["steps"]):
            script = self.folder / f"step{number}.sh"
            script.write_text(step["run"])
            given = {name: self._value(text) for name, text in step["env"].items()}
            done = subprocess.run(
                [*BASH, str(script)], env={**self.env, **self._pairs("env"), **given},
                cwd=self.folder, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                break
        return done

    def _value(self, text: str) -> str:
        """The only two kinds of expression that the action uses."""
        if text == "${{ github.action_path }}":
            return str(self.source)
        name = re.fullmatch(r"\$\{\{ inputs\.([a-z]+) \}\}", text)
        assert name, text
        return self.inputs[name[1]]

    def _pairs(self, name: str) -> dict[str, str]:
        lines = (self.folder / name).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def outputs(self) -> dict[str, str]:
        return self._pairs("output")

    @property
    def summary(self) -> str:
        return (self.folder / "summary").read_text()


def inputs(made: gated.Gated, **changes: str) -> dict[str, str]:
    return {"artifact": str(made.artifact), "reference": str(made.reference), "judge": made.judge,
            "profile": "smoke", **changes}  # fmt: skip


def test_the_clean_environment_has_the_engine_and_no_torch(python: Path) -> None:
    code = "import llama_cpp, importlib.util as u; print(u.find_spec('torch'), u.find_spec('peft'))"
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, env={}, cwd="/"
    )
    assert done.stdout.split() == ["None", "None"], done.stderr


def test_the_action_is_green_and_leaves_every_report(
    made: gated.Gated, python: Path, tmp_path: Path
) -> None:
    runner = Runner(tmp_path, python, inputs(made))
    done = runner.run()
    assert done.returncode == 0, done.stderr
    assert runner.outputs == {"exit-code": "0", "verdict": "PASS"}
    assert f"0 of {gated.HARMFUL} reference refusals lost" in runner.summary
    names = {path.name for path in (tmp_path / "safegene-report").iterdir()}
    assert names == {"report.json", "report.md", "report.html", "report.sarif", "junit.xml"}
    assert "reference_text" not in (tmp_path / "safegene-report" / "report.json").read_text()


def _wheel(name: str, out: Path) -> None:
    """An installed distribution, packed again as the wheel it came from; its scripts are left out."""
    distribution = metadata.distribution(name)
    files = [one for one in distribution.files or () if ".." not in one.parts]
    about = next(one.parent for one in files if one.name == "METADATA")
    about_wheel = (distribution.read_text("WHEEL") or "").splitlines()
    tags = [line.split(": ")[1] for line in about_wheel if line.startswith("Tag: ")]
    parts = [{tag.split("-")[at] for tag in tags} for at in range(3)]
    stem = about.name.removesuffix(".dist-info")
    tag = "-".join(".".join(sorted(part)) for part in parts)
    with zipfile.ZipFile(out / f"{stem}-{tag}.whl", "w") as wheel:
        for one in files:
            if one.name != "RECORD" and "__pycache__" not in one.parts:
                wheel.write(distribution.locate_file(one), str(one))
        names = [*wheel.namelist(), f"{about}/RECORD"]
        wheel.writestr(f"{about}/RECORD", "".join(f"{one},,\n" for one in names))


@pytest.mark.slow
def test_the_action_installs_what_it_needs_without_a_network(
    made: gated.Gated, tmp_path: Path
) -> None:
    """The step as it is, pip and all; only the wheels come from a folder instead of the index."""
    wheels, source = tmp_path / "wheels", tmp_path / "source"
    wheels.mkdir()
    for name in {"setuptools", *_closure([*PROJECT["dependencies"],
                                          *PROJECT["optional-dependencies"]["gguf"]])}:  # fmt: skip
        _wheel(name, wheels)
    # pip builds in the folder it is given
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tiny.REPOSITORY / name, source)
    for name in ("converter", "runtime"):
        shutil.copytree(tiny.REPOSITORY / name, source / name)
    (tmp_path / "run").mkdir()
    runner = Runner(tmp_path / "run", Path(sys.executable), inputs(made), source)
    del runner.env["SAFEGENE_INSTALL"]
    runner.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull,
                   "PYTHONPATH": str(made.site)}  # fmt: skip
    done = runner.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.outputs == {"exit-code": "0", "verdict": "PASS"}
    python = runner._pairs("env")["SAFEGENE_PYTHON"]
    assert Path(python).is_relative_to(tmp_path)
    code = "import safegene_runtime, safegene_converter; print(safegene_runtime.__file__)"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env={})
    assert Path(where.stdout.strip()).is_relative_to(Path(python).parents[1])


def test_the_action_is_red_for_everything_but_a_pass(
    made: gated.Gated, python: Path, tmp_path: Path
) -> None:
    """A profile that the record cannot serve, an edited artifact, an edited record, no artifact."""
    edited, record = tmp_path / "edited", tmp_path / "record"
    shutil.copytree(made.artifact, edited)
    with open(next(edited.glob("*.gguf")), "r+b") as file:
        file.write(b"no gguf")
    shutil.copytree(made.reference, record)
    with open(record / "prompts.jsonl", "a") as file:
        file.write("\n")
    for number, (changes, code, verdict) in enumerate(
        [
            ({"profile": "ci"}, 4, "VACUOUS"),
            ({"artifact": str(edited)}, 1, "FAIL"),
            ({"reference": str(record)}, 5, None),
            ({"artifact": str(tmp_path / "nothing")}, 2, None),
            ({"profile": "$(touch pwned)"}, 2, None),
            ({"attacks": "rot14$(touch pwned)"}, 2, None),
            ({"attacks": "rot13"}, 5, None),  # not recorded
            ({"mode": "loose"}, 2, None),
            ({"sequential": "yes$(touch pwned)"}, 2, None),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        # what an earlier run left must not be taken for this one's
        (folder / "safegene-report").mkdir()
        (folder / "safegene-report" / "report.md").write_text("old")
        runner = Runner(folder, python, inputs(made, **changes))
        done = runner.run()
        assert done.returncode == code, (changes, done.stderr)
        assert runner.outputs.get("verdict") == verdict
        assert runner.outputs["exit-code"] == str(code)
        assert "old" not in runner.summary
        assert (verdict or "could not check") in runner.summary
        assert not (folder / "pwned").exists()


def test_the_actions_and_the_jobs_settings_reach_verify(tmp_path: Path) -> None:
    """With a Python that notes what it is asked and leaves a verdict."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nif [ "$1" = -m ]; then printf "%s\\n" "$@" > "{tmp_path}/asked"\n'
        f"  mkdir -p safegene-report; cd safegene-report; touch report.md\n"
        f"""  echo '{{"verdict": "PASS"}}' > report.json\n"""
        f'elif [ "$2" = "${{2#*torch}}" ]; then exec "{sys.executable}" "$@"; fi\n'
    )
    python.chmod(0o755)
    settings = {
        "control": "plain.gguf", "mode": "as-shipped", "attacks": "rot13,reversed", "sequential": "true",
    }  # fmt: skip
    options = [
        "--control",
        "plain.gguf",
        "--mode",
        "as-shipped",
        "--attacks",
        "rot13,reversed",
        "--sequential",
    ]
    for given, expected in ((settings, options), ({"sequential": "false"}, [])):
        folder = tmp_path / str(len(given))
        folder.mkdir()
        runner = Runner(folder, python, {"artifact": "-OUT", "reference": "REF", **given})
        assert runner.run().returncode == 0
        assert runner.outputs == {"exit-code": "0", "verdict": "PASS"}
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked[-2:] == ["--", "-OUT"]
        assert all(one in asked for one in expected)
        assert ("--sequential" in asked, "--attacks" in asked) == (bool(expected),) * 2
        done = _gitlab(python, folder, {f"SAFEGENE_{k.upper()}": v for k, v in given.items()})
        assert done.returncode == 0, done.stderr
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked[-2:] == ["--", "OUT"]
        assert [one for one in asked if one in options] == expected
    (tmp_path / "asked").unlink()
    assert _gitlab(python, tmp_path, {"SAFEGENE_SEQUENTIAL": "yes"}).returncode == 2
    assert not (tmp_path / "asked").exists()


def test_torch_in_the_environment_of_the_action_is_refused(
    made: gated.Gated, tmp_path: Path
) -> None:
    runner = Runner(tmp_path, Path(sys.executable), inputs(made))
    done = runner.run()
    assert done.returncode == 1
    assert "torch is installed" in done.stderr


def test_the_action_installs_the_engine_that_the_manifest_names(
    made: gated.Gated, tmp_path: Path
) -> None:
    """With a Python that notes what it is asked, instead of a network."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nif [ "$1" = -m ]; then echo "$*" >> "{tmp_path}/asked"\n'
        f'  if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
        f'else exec "{sys.executable}" "$@"; fi\n'
    )
    python.chmod(0o755)
    for target, version in (("gguf", ""), ("onnx", ""), ("onnx", "0.1.0"), ("elf", "")):
        folder = tmp_path / f"{target}{version}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"artifact": {"target": target}}))
        (tmp_path / "asked").write_text("")
        runner = Runner(tmp_path, python, inputs(made, artifact=str(folder), version=version))
        del runner.env["SAFEGENE_INSTALL"]
        done = runner.run()
        asked = (tmp_path / "asked").read_text().splitlines()
        if target == "elf":
            assert (done.returncode, asked) == (2, [])
            continue
        what = f"safegene[{target}]=={version}" if version else f"{tiny.REPOSITORY}[{target}]"
        assert asked[0] == f"-m venv {tmp_path}/safegene"
        assert asked[1].startswith("-m pip install ")
        assert asked[1].endswith(f" {what}")


def test_the_action_takes_no_third_party_action_and_no_input_as_code() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "uses" not in step
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]
    used = " ".join(text for step in ACTION["runs"]["steps"] for text in step["env"].values())
    assert set(re.findall(r"inputs\.([a-z]+)", used)) == set(ACTION["inputs"])


def _gitlab(
    python: Path, folder: Path, variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """The job's script, in one shell as GitLab's runner has it."""
    job = GITLAB["refusal-parity"]
    return subprocess.run(
        [*BASH, "-c", "\n".join(job["script"])], cwd=folder, capture_output=True, text=True,
        env={**job["variables"], "PATH": f"{python.parent}:{os.environ['PATH']}",
             "SAFEGENE_INSTALL": "skip", **variables},
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("profile", "code"), [("smoke", 0), ("ci", 4)])
def test_the_gitlab_job_ends_with_the_code_of_the_verdict(
    made: gated.Gated, python: Path, tmp_path: Path, profile: str, code: int
) -> None:
    job = GITLAB["refusal-parity"]
    settings = {
        "SAFEGENE_ARTIFACT": str(made.artifact), "SAFEGENE_REFERENCE": str(made.reference),
        "SAFEGENE_JUDGE": made.judge, "SAFEGENE_PROFILE": profile,
    }  # fmt: skip
    done = _gitlab(python, tmp_path, settings)
    assert done.returncode == code, done.stderr
    assert (tmp_path / job["artifacts"]["reports"]["junit"]).exists()
    assert job["artifacts"]["when"] == "always"


def test_the_page_on_ci_says_what_the_code_does() -> None:
    text = (tiny.REPOSITORY / "docs" / "ci.md").read_text()
    rows = dict(re.findall(r"^\| (\d) \| ([A-Za-z]+) \|", text, re.MULTILINE))
    codes = {str(one.exit_code): str(one) for one in Verdict}
    assert rows == {**codes, str(EXIT_USAGE): "none", str(EXIT_INVALID_RECORD): "none"}
    workflow = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    steps = workflow["jobs"]["refusal-parity"]["steps"]
    ours = next(step for step in steps if "/safegene@" in step["uses"])
    assert {name for name, one in ACTION["inputs"].items() if one.get("required")} <= set(
        ours["with"]
    )
    assert set(ours["with"]) <= set(ACTION["inputs"])
    for step in steps:
        assert step is ours or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
    for path in re.findall(r"\]\(([^)]+)\)", text):
        assert (tiny.REPOSITORY / "docs" / path).exists(), path
