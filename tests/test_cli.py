"""The command infomcr: its help, how a command line is split, what each mistake prints, completion in a shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import make_folder

from infomcr_dist.cli import COMMANDS, MEASURE, STUDY, TRAIN, main
from infomcr_dist.config import Config
from pipelines.command import INSPECT, PREPARE
from pipelines.options import describe, flat, load, to_dict, to_yaml

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "infomcr_dist" / "recipes" / "demo.yaml")


def words(text: str) -> str:
    """The text without line breaks and indentation, where argparse may break lines at hyphens too."""
    return re.sub(r"- (?=[a-z])", "-", " ".join(text.split()))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_usage_exit_codes_and_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = words(capsys.readouterr().out)
    assert text.startswith(f"usage: infomcr {name} ")
    assert re.search(r"Exit code 0: .*; 2: ", text), "the command's docstring lists its exit codes"
    settings = describe(COMMANDS[name].settings_type())
    assert settings
    for setting in settings:
        assert setting.sentence.endswith("."), f"{setting.name} has a sentence"
        assert f"{setting.name}={setting.type} {words(setting.sentence)} (default: " in text
    # Written out once, independently of where they come from.
    if name == "train":
        assert "regularizer.ramp_steps=int For ramp=steps: number of steps. (default: 4)" in text
        assert "data.backend=dali|torch|resident|webdataset|synthetic Loader" in text
        assert "optimizer.clip_gradient_norm=float|null" in text
        assert "RECIPE one recipe or one of cifar10, demo, imagenet128, imagenet128_modern (default: demo)" in text


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        text = words(capsys.readouterr().out)
        for name, command in COMMANDS.items():
            assert f" {name} {words(command.summary())}" in text
            assert command.summary().endswith("."), "the first paragraph of the docstring is one sentence"


def test_help_and_completion_do_not_wait_for_torch() -> None:
    script = """
import sys
from infomcr_dist.cli import COMMANDS, main
for name in ("", *COMMANDS):
    try:
        main([name, "--help"] if name else ["--help"])
    except SystemExit as end:
        assert end.code == 0
    assert not {"torch", "matplotlib"} & set(sys.modules), name
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_settings_are_understood_in_three_forms() -> None:
    forms = ["epochs=3", "--data.batch_size=8", "--run_dir", "runs/a b", "--optimizer.learning_rate", "-1"]
    expected = ["epochs=3", "data.batch_size=8", "run_dir=runs/a b", "optimizer.learning_rate=-1"]
    assert TRAIN.parse(["cifar10", *forms]) == ([DEMO.replace("demo", "cifar10")], expected)
    assert TRAIN.parse([*forms, DEMO]) == ([DEMO], expected), "in any order"
    assert TRAIN.parse(["epochs=3", "--epochs=4", "--epochs", "5"])[1] == ["epochs=3", "epochs=4", "epochs=5"]
    assert TRAIN.parse(["--run_dir=a=b", "--model="]) == ([DEMO], ["run_dir=a=b", "model="])
    assert STUDY.parse(["table_1", "--grid.network.cnn.epochs", "5"])[1] == ["grid.network.cnn.epochs=5"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_of_text_takes_what_is_typed(name: str, tmp_path: Path) -> None:
    settings = COMMANDS[name].settings_type()
    needed = {"study": ["grid={a: {b: {}}}"], **{key: ["data.batch_size=1"] for key in ("train", "doctor", "plan")}}
    names = {setting.name for setting in describe(settings) if setting.type in ("text", "text|null")}
    for setting in sorted(names - {"telemetry.pushgateway", "compare", "choose"}):  # these must name what exists
        for text in ("4711_1", "073015", "1.10", "on", "run #2", "runs/lr=0.1,bs=64", "1e3", "[x", " a: b ", "12:30"):
            tree = load(settings, None, [*needed.get(name, []), f"{setting}={text}"])
            assert flat(to_dict(tree))[setting] == text
            (tmp_path / "written.yaml").write_text(to_yaml(tree))
            assert load(settings, tmp_path / "written.yaml", []) == tree


def test_the_last_value_wins() -> None:
    (recipe,), overrides = TRAIN.parse(["epochs=9", "--epochs", "7", "schedule.milestones=[]", "--epochs=8"])
    assert load(Config, Path(recipe), overrides).epochs == 8


def test_a_path_with_an_equals_sign_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1,bs=64").mkdir()
    (tmp_path / "seed=3").mkdir()
    given = ["lr=0.1,bs=64", "seed=3", "seed=4", "runs/lr=0.1", "output=x"]
    assert MEASURE.parse(given) == (["lr=0.1,bs=64", "seed=3", "runs/lr=0.1"], ["seed=4", "output=x"])
    assert MEASURE.parse(["--seed=3", "run"]) == (["run"], ["seed=3"]), "with dashes it is a setting in any case"
    assert MEASURE.parse(["run", "--", "lr=1", "--trials"]) == (["run", "lr=1", "--trials"], [])
    for command in COMMANDS.values():  # each takes paths: checkpoints, runs, data sets, recipes
        (tmp_path / "a=1.yaml").touch()
        given = ["lr=0.1,bs=64", "a=1.yaml"] if len(command.arguments) == 2 else ["a=1.yaml"]
        assert command.parse([*given, "seed=4"]) == (given, ["seed=4"])
    assert MEASURE.parse(["run", "x" * 5000 + "=1"]) == (["run"], ["x" * 5000 + "=1"]), "no path can be as long"


def test_shipped_files_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert TRAIN.parse([]) == ([DEMO], [])
    assert TRAIN.parse(["demo"]) == ([DEMO], [])
    assert STUDY.parse(["table_1"]) == ([str(ROOT / "infomcr_dist" / "studies" / "table_1.yaml")], [])
    (tmp_path / "demo").write_text("epochs: 3\n")
    assert TRAIN.parse(["demo"]) == (["demo"], []), "a file that is here comes first"
    (tmp_path / "demo").unlink()
    (tmp_path / "demo").mkdir()
    assert TRAIN.parse(["demo"]) == ([DEMO], []), "a directory is no recipe"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", ["nowhere.yaml"], "recipe nowhere.yaml does not exist: give a YAML file, or one of cifar10, demo, "),
        ("train", ["a", "b"], "give one recipe, then key=value settings, got a b; usage: infomcr train [RECIPE] "),
        ("train", ["--optimizer.momentun=1"], "unknown setting optimizer.momentun: the nearest known one is "),
        ("train", ["--epoch", "3"], "unknown setting epoch: the nearest known one is epochs"),
        ("train", ["--data.mixing=full"], "data.mixing is now data.shuffle"),
        ("train", ["--data.remainder", "drop"], "data.remainder is now data.drop_last: true for drop, false for keep"),
        ("train", ["--epochs"], "--epochs needs a value: --epochs=VALUE, or epochs=VALUE"),
        ("train", ["--epochs", "--seed=3"], "--epochs needs a value"),
        ("train", ["-e", "3"], "unknown option -e: a setting is given as key=value or --key=value"),
        ("measure", [], "give a checkpoint or a run directory, then key=value settings, got none; usage: infomcr "),
        ("study", ["nowhere"], "study nowhere does not exist: give a YAML file, or one of batch_norm, beta, "),
        ("study", ["table_1", "table_2"], "give one study, then key=value settings, got table_1 table_2"),
        ("prepare", ["a"], "give a folder or archive of images and a directory for the data set"),
    ],
)
def test_a_mistake_is_a_value_error_of_one_line(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        COMMANDS[name].parse(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "nearest"), [("trian", "train"), ("mesure", "measure"), ("prep", "prepare")])
def test_an_unknown_command(name: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "x"]) == 2
    assert capsys.readouterr().err == f"error: unknown command {name}: the nearest known one is {nearest}\n"


def test_an_unknown_option_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verbose", "train"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_both_forms_are_the_same_command(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", per_class=2)
    assert PREPARE.main([str(tmp_path / "source"), str(tmp_path / "data"), "--size", "16", "processes=1"]) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    forms = (["infomcr_dist", "inspect"], ["pipelines.inspect"])
    commands = [[sys.executable, "-m", *form, tmp_path / "data"] for form in forms]
    output = [subprocess.run(c, env=environment, stdout=subprocess.PIPE, check=True).stdout for c in commands]
    assert output[0] == output[1]
    assert b"6 samples in 1 shards" in output[0]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_ends_a_command(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def body(positionals: list[str], overrides: list[str]) -> int:
        assert (positionals, overrides) == (["data"], ["images=4"])
        raise error

    assert INSPECT.run(["data", "--images", "4"], body) == code
    assert capsys.readouterr().err == text


def test_a_bug_keeps_its_traceback() -> None:
    def body(positionals: list[str], overrides: list[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        INSPECT.run(["data"], body)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", {"train "}),
        ("train ci", {"cifar10 "}),
        ("study ta", {"table_1", "table_2", "table_3"}),
        ("train data.b", {"data.backend=", "data.batch_size="}),
        ("train cifar10 epochs=3 regularizer.e", {"regularizer.epoch=", "regularizer.estimator="}),
        ("train data.backend=", {"dali", "torch", "resident", "webdataset", "synthetic"}),
        ("train data.backend=w", {"webdataset "}),
        ("train --data.back", {"--data.backend "}),
        ("train --data.backend d", {"dali "}),
        ("train cifar10 data.drop_last=", {"true", "false"}),
        ("train regularizer.sub_batch_size=", set()),
        ("measure my_r", {"my_runs/"}),
        ("prepare x y mode=", {"squash", "crop"}),
    ],
)  # fmt: skip
def test_completion_in_bash(typed: str, offered: set[str], tmp_path: Path) -> None:
    (tmp_path / "my_runs").mkdir()
    program = tmp_path / "bin" / "infomcr"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom infomcr_dist.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    script = """
eval "$(register-python-argcomplete infomcr)"
COMP_TYPE=9 COMP_KEY=9 COMP_POINT=${#COMP_LINE}
_python_argcomplete infomcr
printf '%s\\n' "${COMPREPLY[@]}"
"""
    environment = os.environ | {
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COMP_LINE": f"infomcr {typed}",
    }
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    assert {word for word in result.stdout.split("\n") if word} == offered
