"""The wordings under which a model reads a problem. How they become prompts is chat.py's."""

import re
from dataclasses import dataclass, fields

from mpd_jax.types import UserError

PLACEHOLDER = re.compile(r"\{(question|draft|reference)\}")
_BOX = "Put your final answer within \\boxed{}."
# CRISP's concise contexts (arXiv 2603.05433): uniform, with regard to difficulty, and with a soft budget.
CONCISE = {
    "v1": "{question}\n\nSolve it concisely and correctly: be direct, only the key steps, no elaboration, no "
    f"restating. {_BOX}",
    "v2": "{question}\n\nSolve it correctly first of all, and no longer than it needs. Where it is easy, be direct. "
    f"Where it is hard, do not condense too far: keep the cases, the edge cases and a short check. {_BOX}",
    **{
        f"budget_{share}": f"{{question}}\n\nSolve it correctly in {share} % fewer tokens than you usually would, by "
        f"leaving out elaboration. {_BOX}"
        for share in (20, 50, 80)
    },
}
_REWRITE_FORM = (
    "Write the rewritten reasoning, then a line that holds only ####, then the final answer in \\boxed{}. Write no "
    "introduction and no remarks."
)


@dataclass(frozen=True)
class Contexts:
    """The user message under each context. {question}, {draft} and {reference} are filled in; other braces stay.

    The wordings are ours: the papers' own are not published (MPD) or paraphrased. concise: a wording, or the name of
    one of `CONCISE`.
    """

    plain: str = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    concise: str = "v1"
    compress: str = (
        "Problem:\n{question}\n\nDraft of its solution:\n{draft}\n\nCondense the reasoning of the draft. Bring "
        "together all the information in it that the answer needs, leave out restating, detours and repeated checks, "
        "and introduce nothing new. " + _REWRITE_FORM
    )
    repair: str = (
        "Problem:\n{question}\n\nDraft of its solution:\n{draft}\n\nThe draft may contain mistakes. Rewrite its "
        "reasoning so that every step is right, and change nothing that is right already. " + _REWRITE_FORM
    )
    privileged: str = (
        "{question}\n\nA reference solution:\n{reference}\n\nHaving understood it, solve the problem in your own "
        "words. Please reason step by step, and put your final answer within \\boxed{}."
    )

    def wording(self, context: str) -> str:
        """The user message under `context`, its placeholders open."""
        text: str = getattr(self, context)
        return CONCISE.get(text, text) if context == "concise" else text


def check_contexts(contexts: Contexts) -> None:
    """Refuses a context that lacks what it must quote, or quotes what its reader may not see."""
    needs = {"plain": (), "concise": (), "compress": ("draft",), "repair": ("draft",), "privileged": ("reference",)}
    for field in fields(contexts):
        text = contexts.wording(field.name)
        found, wanted = set(PLACEHOLDER.findall(text)), {"question", *needs[field.name]}
        if found != wanted:
            missing = ", ".join(f"{{{name}}}" for name in sorted(wanted - found))
            extra = ", ".join(f"{{{name}}}" for name in sorted(found - wanted))
            remedy = f"add {missing}" if missing else f"remove {extra}"
            if field.name == "concise":
                remedy += f", or name one of {', '.join(CONCISE)}"
            raise UserError(f"recipe.contexts.{field.name}: {text!r} cannot be used; {remedy}")
