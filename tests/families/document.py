"""docs/models.md, from the families and what becomes of them:

PYTHONPATH=tests python -m families.document > docs/models.md
"""

from __future__ import annotations

from importlib.metadata import version

from families import zoo
from families.configs import VARIANTS
from families.outcomes import NEED_METAL, REFUSALS, SHAPES

from mlxpage.metal import anatomy
from mlxpage.metal.model import Model

_HEAD = """\
# Models

Every family of mlx-lm {version}, as a tiny random model of its own configuration class shows.
{served} of them, and {variants} variants, generate over a block pool what mlx-lm generates one
prompt at a time: eight prompts of 3 to 70 tokens in one batch, in chunks, in a pool so small that
some are preempted, the same tokens in float32 and log-probabilities within 0.002. {refused} are
refused when they are loaded, with an error that says why. {metal} need a Mac to be tried. Whatever
is loaded is checked once more on its own weights, and refused if it isn't right.

    .venv/bin/python -m pytest -m full tests/families         # runs them all
    PYTHONPATH=tests .venv/bin/python -m families.document    # prints this page

- **Step**: *rows*: all sequences in one forward, each token a row of its own; kernels serve it on a
  GPU. *chunks*: the chunk of a prompt in a forward of its own, single tokens together. *sequences*:
  each sequence in a forward of its own. The last two are served by the reference backend, on a GPU
  too; some models get K and V gathered then, and attend by themselves.
- **Attention**: to all positions, in a sliding window, or to a latent that K and V are made of.
- **States**: of recurrences, convolutions and the like. They lie in blocks of a pool as K and V do:
  a prompt that begins alike goes on from the state at the end of a block.
- All have a prefix cache, forks, preemption and blocks on disk.

`mlxpage show MODEL` says it of one model before its weights are loaded.
"""


def document() -> str:
    rows = [_row(case) for case in zoo.CASES]
    families = [case for case in zoo.CASES if case not in VARIANTS]
    served = [case for case in SHAPES if case not in NEED_METAL]
    head = _HEAD.format(
        version=version("mlx-lm"),
        served=len([case for case in served if case in families]),
        variants=len([case for case in served if case in VARIANTS]),
        refused=len([case for case in REFUSALS if case in families]),
        metal=len(NEED_METAL),
    )
    table = ["| family | attention | step |", "|---|---|---|"]
    table += [" | ".join(["", *row, ""]).strip() for row in rows if len(row) == 3]
    refused = ["| family | what is missing |", "|---|---|"]
    refused += [" | ".join(["", *row, ""]).strip() for row in rows if len(row) == 2]
    return "\n".join([head, *table, "", "## Refused", "", *refused, ""])


def _row(case: str) -> list[str]:
    if case in REFUSALS:
        return [case, REFUSALS[case].lacks]
    if case in NEED_METAL:
        return [case, "?", "not tried: its module calls Metal kernels of its own"]
    return [case, _attention(case), SHAPES[case].name.lower()]


def _attention(case: str) -> str:
    module, config = zoo.make(case)
    return anatomy.attention_kinds(Model(module, config).specs, config)


if __name__ == "__main__":
    print(document(), end="")
