"""A recipe: the four answers, and the reasons for which some combinations are refused.

What is not refused is allowed, also where no paper has a name for it. Ranges of single values are checked by their
owners; what depends on models, problems or sizes is checked where those are known (config.py, build.py).
"""

from dataclasses import dataclass, field

from mpd_jax.data.contexts import Contexts, check_contexts
from mpd_jax.recipe.keep import GRADED, rule
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.recipe.rewrite import RewriteConfig
from mpd_jax.recipe.target import TargetConfig
from mpd_jax.recipe.weights import token_weight
from mpd_jax.recipe.write import WriteConfig
from mpd_jax.types import UserError

__all__ = ["Contexts", "LossConfig", "Recipe", "RewriteConfig", "TargetConfig", "WriteConfig", "refusals", "validate"]


@dataclass(frozen=True)
class Recipe:
    """Who writes, who rewrites, which target, which loss: all four have to be said. Contexts are the wordings."""

    write: WriteConfig
    rewrite: RewriteConfig
    target: TargetConfig
    loss: LossConfig
    contexts: Contexts = field(default_factory=Contexts)


def refusals(recipe: Recipe) -> list[str]:
    """Why a recipe makes no sense: key, value and remedy of each reason."""
    return [message for refused, message in _reasons(recipe) if refused]


def validate(recipe: Recipe) -> None:
    """Raises UserError with every reason against a recipe."""
    found = refusals(recipe)
    if found:
        raise UserError("\n".join(found))
    for name in recipe.rewrite.keep:
        rule(name)
    check_contexts(recipe.contexts)
    token_weight(recipe.loss.token_weight)


def _reasons(recipe: Recipe) -> list[tuple[bool, str]]:
    return [
        *_write_reasons(recipe),
        *_keep_reasons(recipe.rewrite),
        *_rewrite_reasons(recipe.rewrite),
        *_target_reasons(recipe),
        *_loss_reasons(recipe.loss),
        *_sampled_reasons(recipe),
    ]


def _write_reasons(recipe: Recipe) -> list[tuple[bool, str]]:
    write = recipe.write
    return [
        (
            write.attempts < 1,
            f"recipe.write.attempts: {write.attempts} is not allowed; it must be 1 or more",
        ),
        (
            write.by == "dataset" and write.attempts > 1,
            f"recipe.write.attempts: {write.attempts} with recipe.write.by=dataset would repeat each item unchanged; "
            "set it to 1, or let a model write",
        ),
    ]


def _keep_reasons(rewrite: RewriteConfig) -> list[tuple[bool, str]]:
    nobody, compared = rewrite.how == "nobody", {"shorter", "same_answer"}.intersection(rewrite.keep)
    return [
        (
            nobody and bool(compared),
            f"recipe.rewrite.keep: {sorted(compared)} compares a rewrite with its original, and "
            "recipe.rewrite.how=nobody makes none; take it out, or let something rewrite",
        ),
        (
            nobody and rewrite.fallback == "original",
            "recipe.rewrite.fallback: 'original' replaces failed rewrites, and recipe.rewrite.how=nobody makes none; "
            "leave it at drop, or set how to compress or truncate",
        ),
        (
            rewrite.grader != "rules" and not set(GRADED).intersection(rewrite.keep),
            f"recipe.rewrite.grader: {rewrite.grader!r} judges the rules {' and '.join(GRADED)}, and "
            "recipe.rewrite.keep names neither; add one to keep, or leave grader at rules",
        ),
        (
            len(set(rewrite.keep)) < len(rewrite.keep),
            f"recipe.rewrite.keep: {list(rewrite.keep)} names a rule twice; name each once",
        ),
    ]


def _rewrite_reasons(rewrite: RewriteConfig) -> list[tuple[bool, str]]:
    truncate = rewrite.how == "truncate"
    budgets = [name for name in ("truncate_to", "truncate_ratio") if getattr(rewrite, name) is not None]
    return [
        (
            rewrite.by == "student" and not rewrite.by_model,
            f"recipe.rewrite.by: 'student' has no part in recipe.rewrite.how={rewrite.how}, where no model rewrites; "
            "set how to compress or repair, or leave by out",
        ),
        (
            rewrite.window is not None and not rewrite.by_model,
            f"recipe.rewrite.window: {rewrite.window} bounds what a model reads, and with recipe.rewrite.how="
            f"{rewrite.how} none does; set how to compress or repair, or remove it",
        ),
        (
            rewrite.window is not None and rewrite.window < 1,
            f"recipe.rewrite.window: {rewrite.window} is not allowed; it must be 1 or more tokens",
        ),
        (
            rewrite.too_long == "trim" and not rewrite.by_model,
            f"recipe.rewrite.too_long: 'trim' shortens the draft that a model reads, and with recipe.rewrite.how="
            f"{rewrite.how} none does; set how to compress or repair, or leave it at drop",
        ),
        (
            rewrite.max_age < 0,
            f"recipe.rewrite.max_age: {rewrite.max_age} is not allowed; it must be 0 (nothing is used again) or more "
            "updates",
        ),
        (
            rewrite.max_age > 0 and rewrite.how == "nobody",
            f"recipe.rewrite.max_age: {rewrite.max_age} lets rewrites be used again, and recipe.rewrite.how=nobody "
            "makes none; set it to 0, or let something rewrite",
        ),
        (
            truncate and len(budgets) != 1,
            f"recipe.rewrite.truncate_to: how=truncate needs one budget and got {len(budgets)}; set truncate_to "
            "(tokens) or truncate_ratio (share of the original's reasoning)",
        ),
        (
            not truncate and bool(budgets),
            f"recipe.rewrite.{budgets[0] if budgets else ''}: a budget, but recipe.rewrite.how={rewrite.how} cuts "
            "nothing; set how=truncate, or remove it",
        ),
        (
            rewrite.truncate_to is not None and rewrite.truncate_to < 0,
            f"recipe.rewrite.truncate_to: {rewrite.truncate_to} is not allowed; it must be 0 or more",
        ),
        (
            rewrite.truncate_ratio is not None and not 0 <= rewrite.truncate_ratio < 1,
            f"recipe.rewrite.truncate_ratio: {rewrite.truncate_ratio} is not allowed; it must lie in [0, 1)",
        ),
    ]


def _target_reasons(recipe: Recipe) -> list[tuple[bool, str]]:
    target, kind = recipe.target, recipe.loss.kind
    none, refreshed = target.weights == "none", target.weights == "self_refreshed"
    return [
        (
            kind == "cross_entropy" and not none,
            f"recipe.target.weights: {target.weights!r} has no part in recipe.loss.kind=cross_entropy, whose target is "
            "the tokens themselves; set recipe.target.weights=none, or choose a divergence",
        ),
        (
            none and recipe.write.by == "student" and recipe.rewrite.how == "nobody",
            "recipe.write.by: 'student' with recipe.rewrite.how=nobody and recipe.target.weights=none would train the "
            "student on its own words; let another model write or rewrite, or name a target",
        ),
        (
            none and recipe.write.by == "student" and recipe.rewrite.fallback == "original",
            "recipe.rewrite.fallback: 'original' with recipe.write.by=student and recipe.target.weights=none would "
            "train the student on its own words; set fallback=drop, or name a target",
        ),
        (
            kind != "cross_entropy" and none,
            f"recipe.loss.kind: {kind!r} measures the distance to a distribution, and recipe.target.weights=none gives "
            "none; set weights to teacher, self_frozen or self_refreshed, or use kind=cross_entropy",
        ),
        (
            none and recipe.loss.token_weight == "entropy_guided",
            "recipe.loss.token_weight: 'entropy_guided' lowers the tokens that the target is unsure of, and "
            "recipe.target.weights=none has no entropy; set token_weight=none, or name a target",
        ),
        (
            target.every is not None and not refreshed,
            f"recipe.target.every: {target.every} renews a self copy, and recipe.target.weights={target.weights} has "
            "none to renew; remove it, or set weights=self_refreshed",
        ),
        (
            refreshed and (target.every is None or target.every < 1),
            f"recipe.target.every: {target.every} is not allowed with weights=self_refreshed; set the updates between "
            "renewals, 1 or more (CRISP: 50; at 1 it collapsed)",
        ),
        (
            none and target.context != "plain",
            f"recipe.target.context: {target.context!r} is what a target reads, and recipe.target.weights=none has "
            "none; remove it, or name a target",
        ),
        (
            target.context == "rewrite" and not recipe.rewrite.by_model,
            f"recipe.target.context: 'rewrite' is what a rewriter reads, and with recipe.rewrite.how="
            f"{recipe.rewrite.how} no model does; set how to compress or repair, or choose another context",
        ),
        (
            target.context == "rewrite" and recipe.rewrite.fallback == "original",
            "recipe.rewrite.fallback: 'original' with recipe.target.context=rewrite would have the target read an "
            "instruction to rewrite before what is no rewrite; set fallback=drop, or choose another context",
        ),
        (
            target.context == "rewrite" and target.top_k > 0,
            f"recipe.target.top_k: {target.top_k} has servers score a response right behind a prompt, and "
            "recipe.target.context=rewrite reads it with another delimiter inside; set top_k=0, or another context",
        ),
        (
            target.own_template and target.weights != "teacher",
            f"recipe.target.own_template: true lets the teacher read by its own template, and recipe.target.weights="
            f"{target.weights} reads by the student's; remove it, or set weights=teacher",
        ),
        (
            target.top_k < 0,
            f"recipe.target.top_k: {target.top_k} is not allowed; it must be 0 (the whole distribution) or more",
        ),
        (
            target.top_k > 0 and target.weights != "teacher",
            f"recipe.target.top_k: {target.top_k} asks a teacher's servers, and recipe.target.weights={target.weights} "
            "is on the mesh, where the whole distribution is read; set top_k=0, or weights=teacher",
        ),
        (
            target.top_k > 0 and recipe.loss.stabiliser == "per_entry",
            f"recipe.target.top_k: {target.top_k} makes one bucket of all other tokens, and "
            "recipe.loss.stabiliser=per_entry clips single tokens; use rescale or none, or top_k=0",
        ),
        (
            target.top_k > 0 and recipe.loss.merge_stops,
            f"recipe.target.top_k: {target.top_k} tells of a stop token only where it is among the k most likely, and "
            "recipe.loss.merge_stops adds all of them up; set merge_stops=false, or top_k=0",
        ),
    ]


def _loss_reasons(loss: LossConfig) -> list[tuple[bool, str]]:
    defaults = LossConfig()
    reasons = []
    for name, wants, used in (
        ("clip", "stabiliser=rescale or per_entry", loss.stabiliser != "none"),
        ("teacher_weight", "kind=jsd", loss.kind == "jsd"),
        ("reverse_weight", "kind=mix", loss.kind == "mix"),
    ):
        value = getattr(loss, name)
        reasons.append(
            (
                value != getattr(defaults, name) and not used,
                f"recipe.loss.{name}: {value} has no effect without recipe.loss.{wants}; set that, or remove {name}",
            )
        )
    return reasons


def _sampled_reasons(recipe: Recipe) -> list[tuple[bool, str]]:
    """policy_gradient is unbiased only over tokens that the student has just drawn."""
    sampled = recipe.loss.kind == "policy_gradient"
    says = "recipe.loss.kind: 'policy_gradient' estimates the reverse KL from tokens drawn from the student, and "
    remedy = "or use kind=reverse_kl, which is exact on any text"
    return [
        (
            sampled and recipe.rewrite.how != "nobody",
            f"{says}recipe.rewrite.how={recipe.rewrite.how} replaces them, so that it would be biased; set "
            f"how=nobody, {remedy}",
        ),
        (
            sampled and bool(recipe.rewrite.keep),
            f"{says}recipe.rewrite.keep={list(recipe.rewrite.keep)} chooses among them by what follows, so that it "
            f"would be biased; leave it empty, {remedy}",
        ),
        (
            sampled and recipe.write.by != "student",
            f"{says}recipe.write.by={recipe.write.by} has others write, so that it would be biased; set by=student, "
            f"{remedy}",
        ),
        (
            sampled and recipe.target.top_k > 0,
            f"{says}compares them with the target's, of which recipe.target.top_k={recipe.target.top_k} does not tell "
            "where they are not among its k most likely; set top_k=0, or use kind=reverse_kl",
        ),
    ]
