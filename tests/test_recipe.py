"""Claims about recipes: what makes no sense is refused with its reason, and all the rest is allowed."""

import itertools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from mpd_jax import recipe as table
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.recipe.recipe import Contexts, Recipe, RewriteConfig, TargetConfig, WriteConfig, refusals, validate
from mpd_jax.types import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def recipe(write=None, rewrite=None, target=None, loss=None, contexts=None) -> Recipe:
    """On-policy distillation with differences."""
    return Recipe(
        WriteConfig(**(write or {})),
        RewriteConfig(**(rewrite or {})),
        TargetConfig(**(target or {})),
        LossConfig(**(loss or {})),
        Contexts(**(contexts or {})),
    )


SELF = {"weights": "self_refreshed", "context": "concise", "every": 50}
REFUSED = [
    ({"write": {"attempts": 0}}, "recipe.write.attempts: 0 is not allowed"),
    ({"write": {"by": "dataset", "attempts": 2}}, "recipe.write.attempts: 2 with recipe.write.by=dataset"),
    ({"rewrite": {"keep": ("shorter",)}}, "recipe.rewrite.keep: ['shorter'] compares a rewrite with its original"),
    ({"rewrite": {"keep": ("same_answer",)}}, "recipe.rewrite.keep: ['same_answer'] compares a rewrite"),
    ({"rewrite": {"by": "student"}}, "recipe.rewrite.by: 'student' has no part in recipe.rewrite.how=nobody"),
    ({"rewrite": {"window": 100}}, "recipe.rewrite.window: 100 bounds what a model reads"),
    ({"rewrite": {"how": "repair", "window": 0}}, "recipe.rewrite.window: 0 is not allowed"),
    ({"rewrite": {"too_long": "trim"}}, "recipe.rewrite.too_long: 'trim' shortens the draft"),
    ({"rewrite": {"how": "compress", "max_age": -1}}, "recipe.rewrite.max_age: -1 is not allowed"),
    ({"rewrite": {"max_age": 8}}, "recipe.rewrite.max_age: 8 lets rewrites be used again"),
    ({"target": {"context": "rewrite"}}, "recipe.target.context: 'rewrite' is what a rewriter reads"),
    (
        {"rewrite": {"how": "repair", "fallback": "original"}, "target": {"context": "rewrite"}},
        "recipe.rewrite.fallback: 'original' with recipe.target.context=rewrite",
    ),
    (
        {"rewrite": {"how": "repair"}, "target": {"context": "rewrite", "top_k": 8}},
        "recipe.target.top_k: 8 has servers score a response right behind a prompt",
    ),
    ({"target": {**SELF, "own_template": True}}, "recipe.target.own_template: true lets the teacher read"),
    ({"rewrite": {"fallback": "original"}}, "recipe.rewrite.fallback: 'original' replaces failed rewrites"),
    (
        {"rewrite": {"how": "compress", "keep": ("shorter", "shorter")}},
        "recipe.rewrite.keep: ['shorter', 'shorter'] names",
    ),
    (
        {"rewrite": {"how": "compress", "grader": "math_verify"}},
        "recipe.rewrite.grader: 'math_verify' judges the rules",
    ),
    (
        {
            "rewrite": {"how": "compress", "fallback": "original"},
            "target": {"weights": "none"},
            "loss": {"kind": "cross_entropy"},
        },
        "recipe.rewrite.fallback: 'original' with recipe.write.by=student and recipe.target.weights=none",
    ),
    ({"rewrite": {"how": "truncate"}}, "recipe.rewrite.truncate_to: how=truncate needs one budget and got 0"),
    (
        {"rewrite": {"how": "truncate", "truncate_to": 9, "truncate_ratio": 0.5}},
        "recipe.rewrite.truncate_to: how=truncate needs one budget and got 2",
    ),
    ({"rewrite": {"how": "compress", "truncate_to": 9}}, "recipe.rewrite.truncate_to: a budget, but"),
    ({"rewrite": {"truncate_ratio": 0.5}}, "recipe.rewrite.truncate_ratio: a budget, but"),
    ({"rewrite": {"how": "truncate", "truncate_to": -1}}, "recipe.rewrite.truncate_to: -1 is not allowed"),
    ({"rewrite": {"how": "truncate", "truncate_ratio": 1.0}}, "recipe.rewrite.truncate_ratio: 1.0 is not allowed"),
    (
        {"write": {"by": "teacher"}, "loss": {"kind": "cross_entropy"}},
        "recipe.target.weights: 'teacher' has no part in recipe.loss.kind=cross_entropy",
    ),
    (
        {"write": {"by": "teacher"}, "target": {"weights": "none"}},
        "recipe.loss.kind: 'reverse_kl' measures the distance to a distribution",
    ),
    (
        {"write": {"by": "teacher"}, "target": {"weights": "none"}, "loss": {"kind": "jsd"}},
        "recipe.loss.kind: 'jsd' measures the distance",
    ),
    (
        {"target": {"weights": "none"}, "loss": {"kind": "cross_entropy"}},
        "recipe.write.by: 'student' with recipe.rewrite.how=nobody and recipe.target.weights=none",
    ),
    ({"target": {"every": 50}}, "recipe.target.every: 50 renews a self copy"),
    ({"target": {"weights": "self_frozen", "every": 50}}, "recipe.target.every: 50 renews a self copy"),
    ({"target": {**SELF, "every": None}}, "recipe.target.every: None is not allowed with weights=self_refreshed"),
    ({"target": {**SELF, "every": 0}}, "recipe.target.every: 0 is not allowed with weights=self_refreshed"),
    (
        {
            "write": {"by": "teacher"},
            "target": {"weights": "none", "context": "concise"},
            "loss": {"kind": "cross_entropy"},
        },
        "recipe.target.context: 'concise' is what a target reads",
    ),
    (
        {"rewrite": {"how": "compress"}, "loss": {"kind": "policy_gradient"}},
        "recipe.loss.kind: 'policy_gradient' estimates the reverse KL from tokens drawn from the student, and "
        "recipe.rewrite.how=compress replaces them",
    ),
    (
        {"rewrite": {"keep": ("finished",)}, "loss": {"kind": "policy_gradient"}},
        "recipe.loss.kind: 'policy_gradient' estimates the reverse KL from tokens drawn from the student, and "
        "recipe.rewrite.keep=['finished'] chooses among them",
    ),
    (
        {"write": {"by": "dataset"}, "loss": {"kind": "policy_gradient"}},
        "recipe.loss.kind: 'policy_gradient' estimates the reverse KL from tokens drawn from the student, and "
        "recipe.write.by=dataset has others write",
    ),
    (
        {"target": {"top_k": 4}, "loss": {"kind": "policy_gradient"}},
        "recipe.loss.kind: 'policy_gradient' estimates the reverse KL from tokens drawn from the student, and compares",
    ),
    (
        {
            "write": {"by": "teacher"},
            "target": {"weights": "none"},
            "loss": {"kind": "cross_entropy", "token_weight": "entropy_guided"},
        },
        "recipe.loss.token_weight: 'entropy_guided' lowers the tokens that the target is unsure of",
    ),
    ({"loss": {"token_weight": "entropy"}}, "recipe.loss.token_weight: 'entropy' is not known"),
    ({"loss": {"token_weight": "absent:f"}}, "recipe.loss.token_weight: 'absent:f' cannot be imported"),
    ({"target": {"top_k": 4}, "loss": {"merge_stops": True}}, "recipe.target.top_k: 4 tells of a stop token only"),
    ({"loss": {"clip": 0.1}}, "recipe.loss.clip: 0.1 has no effect without recipe.loss.stabiliser"),
    ({"loss": {"teacher_weight": 0.1}}, "recipe.loss.teacher_weight: 0.1 has no effect without recipe.loss.kind=jsd"),
    ({"loss": {"reverse_weight": 0.1}}, "recipe.loss.reverse_weight: 0.1 has no effect without recipe.loss.kind=mix"),
]


@pytest.mark.parametrize(("parts", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_what_makes_no_sense_is_refused_with_its_only_reason(parts, message):
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        validate(recipe(**parts))
    assert len(str(refusal.value).splitlines()) == 1, "one mistake, one reason"
    assert ";" in str(refusal.value), "a remedy follows the reason"


def test_an_estimate_of_a_divergence_wants_a_target_too():
    found = refusals(recipe(target={"weights": "none"}, loss={"kind": "policy_gradient"}))
    assert any(text.startswith("recipe.loss.kind: 'policy_gradient' measures the distance to a") for text in found)


def test_every_reason_is_told_at_once():
    with pytest.raises(UserError) as refusal:
        validate(recipe(target={"every": 3}, loss={"clip": 0.1}))
    assert len(str(refusal.value).splitlines()) == 2


def test_contexts_are_checked_with_the_recipe():
    with pytest.raises(UserError, match=r"recipe\.contexts\.plain.*add \{question\}"):
        validate(recipe(contexts={"plain": "Solve."}))


ALLOWED = [
    {},
    {"loss": {"stabiliser": "rescale", "clip": 0.1}},
    {"loss": {"stabiliser": "per_entry", "clip": 0.1, "kind": "jsd", "teacher_weight": 0.1}},
    {"loss": {"kind": "mix", "reverse_weight": 0.1, "reduction": "sum"}},
    {"loss": {"kind": "policy_gradient", "merge_stops": True, "token_weight": "entropy_guided"}},
    {"loss": {"token_weight": "jax.numpy:ones_like"}},
    {"target": SELF},
    {"target": {**SELF, "context": "plain"}, "rewrite": {"how": "compress", "keep": ("finished", "shorter")}},
    {"write": {"by": "dataset"}, "rewrite": {"how": "compress", "by": "student", "fallback": "original"}},
    {"write": {"by": "teacher", "attempts": 4}, "rewrite": {"how": "truncate", "truncate_to": 0}},
]


@pytest.mark.parametrize("parts", ALLOWED)
def test_what_makes_sense_is_allowed(parts):
    validate(recipe(**parts))


def test_the_four_axes_are_independent_but_for_the_loss_and_its_target():
    hints = {
        name: get_type_hints(config) for name, config in (("w", WriteConfig), ("r", RewriteConfig), ("t", TargetConfig))
    }
    axes = (
        get_args(hints["w"]["by"]),
        get_args(hints["r"]["how"]),
        get_args(hints["r"]["by"]),
        get_args(hints["t"]["weights"]),
        get_args(hints["t"]["context"]),
        get_args(get_type_hints(LossConfig)["kind"]),
    )
    for write, how, by, weights, context, kind in itertools.product(*axes):
        made = recipe(
            {"by": write},
            {"how": how, "by": by, "truncate_to": 9 if how == "truncate" else None},
            {"weights": weights, "context": context, "every": 5 if weights == "self_refreshed" else None},
            {"kind": kind},
        )
        matched = (weights == "none") == (kind == "cross_entropy")
        own_words = weights == "none" and write == "student" and how == "nobody"
        drawn = (write, how) == ("student", "nobody") or kind != "policy_gradient"
        asked = how in ("compress", "repair")
        read = (weights != "none" or context == "plain") and (context != "rewrite" or asked)
        sensible = matched and drawn and not own_words and read and (asked or by == "teacher")
        assert (not refusals(made)) == sensible


def answers(section: dict[str, Any]) -> tuple[str, str, str, str]:
    """A YAML file's recipe in the words of the method table."""
    rewrite, target = section["rewrite"], section["target"]
    how = rewrite["how"]
    if how in ("compress", "repair"):
        how += f" by {rewrite['by']}"
    if rewrite.get("truncate_to") == 0:
        how += " to 0"
    weights = target["weights"]
    if weights == "self_refreshed":
        weights += f"({target['every']})"
    where = weights if weights == "none" else f"{weights} / {target.get('context', 'plain')}"
    rules = f", {', '.join(rewrite['keep'])}" if rewrite.get("keep") else ""
    return section["write"]["by"], how + rules, where, section["loss"]["kind"]


def test_the_method_table_says_what_the_configs_hold():
    rows = {}
    for line in (table.__doc__ or "").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[-1].endswith(".yaml`"):
            rows[cells[-1].strip("`")] = tuple(cells[1:5])
    assert len(rows) >= 8
    for path in CONFIGS:
        if path.name == "quickstart.yaml":
            continue
        content = yaml.safe_load(path.read_text())
        found = answers(content["recipe"])
        third = "rewriter" in content
        assert rows.pop(path.name) == (
            tuple(a.replace("by teacher", "by a third model") for a in found) if third else found
        )
    assert not rows, "rows without a config"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipe_of_every_config_is_complete_and_valid(path):
    content = yaml.safe_load(path.read_text())
    section = content["recipe"]
    assert next(iter(content)) == "recipe" and len(path.read_text().splitlines()) <= 60
    assert {"write", "rewrite", "target", "loss"} <= set(section)
    for name, owner in (("write", WriteConfig), ("rewrite", RewriteConfig), ("target", TargetConfig)):
        assert set(section[name]) <= {field.name for field in fields(owner)}
    keep = {"keep": tuple(section["rewrite"].get("keep", ()))}
    validate(
        recipe(
            section["write"],
            {**section["rewrite"], **keep},
            section["target"],
            section["loss"],
            section.get("contexts"),
        )
    )
