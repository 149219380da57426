"""Settings: recipes and overrides, round trips, and the message for each mistake."""

from pathlib import Path

import pytest

from infomcr_dist.config import Config
from pipelines import options

RECIPES = sorted((Path(__file__).parent.parent / "infomcr_dist" / "recipes").glob("*.yaml"))


def load(*overrides: str, recipe: Path | None = None) -> Config:
    return options.load(Config, recipe, list(overrides))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    assert load(recipe=recipe) in {load(recipe=recipe)}, "equal configurations are one key"


def test_overrides_come_after_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("epochs: 7\noptimizer: {momentum: 0.5, learning_rate: 1e-2}\ndata: {batch_size: 8}\n")
    config = load("optimizer.momentum=0.8", "schedule.milestones=[2,4.5]", recipe=recipe)
    assert (config.epochs, config.optimizer.momentum, config.optimizer.learning_rate) == (7, 0.8, 0.01)
    assert config.data.batch_size == 8
    assert config.data.global_batch_size is None
    assert config.schedule.milestones == (2.0, 4.5)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load(
        "data.batch_size=8", "schedule.milestones=[2,4.5]", "regularizer.sub_batches=4", "telemetry.port=null"
    )
    path = tmp_path / "config.yaml"
    path.write_text(options.to_yaml(config))
    assert load(recipe=path) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.momentun=0.9"], "unknown setting optimizer.momentun: the nearest known one is optimizer.momentum"),
        (["epoch=3"], "unknown setting epoch: the nearest known one is epochs"),
        (["data.batch_size=many"], "data.batch_size must be a whole number or null, got 'many'"),
        (["epochs=1.5"], "epochs must be a whole number, got 1.5"),
        (["epochs=0"], "epochs must be at least 1, got 0"),
        (["regularizer.estimator=fast"], "regularizer.estimator must be one of fused, sampled, reference, got 'fast'"),
        (["data=3"], "data must be a section of settings, got 3"),
        (["momentum"], "argument 'momentum' is not of the form key=value"),
        (["optimizer.momentum=["], r"optimizer.momentum must be a number, got '\[': .* are not valid YAML"),
        (["data.batch_size=8", "data.global_batch_size=16"], "give one of batch_size .* got batch_size=8"),
        (
            ["regularizer.estimator=sampled", "regularizer.sub_batches=8"],
            "one of num_sampled and overhead_budget goes with estimator=sampled",
        ),
        (
            ["regularizer.when=from_epoch", "regularizer.sub_batches=8"],
            "regularizer.epoch goes with",
        ),
        (["regularizer.sub_batches=8", "regularizer.sub_batch_size=8"], "give one of sub_batches and sub_batch_size"),
        (
            ["regularizer.method=esam"],
            "regularizer.method must be one of infomcr, sam, asam, gradient_norm, got 'esam'",
        ),
        (
            ["regularizer.sub_batches=8", "regularizer.method=sam", "regularizer.rho=0"],
            "regularizer.rho must be positive, got 0",
        ),
        (
            ["regularizer.sub_batches=8", "regularizer.method=gradient_norm"],
            "regularizer.beta must be at most 1 for .*=gradient_norm, got 10.0",
        ),
        (
            ["regularizer.sub_batches=8", "regularizer.method=sam", "regularizer.estimator=reference"],
            "regularizer.estimator must be fused or sampled for regularizer.method=sam, got reference",
        ),
        (
            ["regularizer.sub_batches=8", "regularizer.method=asam", "regularizer.step=0.01"],
            "regularizer.step must be auto for .*=asam, got 0.01",
        ),
        (["schedule.milestones=[4,2]"], r"schedule.milestones must be increasing, got \[4.0, 2.0\]"),
        (["schedule.milestones=[10]", "epochs=10"], "schedule.milestones must come before the end"),
        (["schedule.milestones=[1]", "schedule.warmup_epochs=2"], "schedule.milestones must come after the warm-up"),
        (["optimizer.momentum=0"], "optimizer.nesterov needs momentum"),
        (["resume=auto"], "resume=auto looks for checkpoints in run_dir"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_missing_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe .*nowhere\.yaml does not exist"):
        load(recipe=tmp_path / "nowhere.yaml")
    for content in ("- 1\n- 2\n", "a: [1\n"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"not valid YAML|must be a mapping"):
            load(recipe=tmp_path / "bad.yaml")
