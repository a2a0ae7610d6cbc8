"""Compares the logits that a call gives of several positions with the reference. Only guessing ahead asks for them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from export.checks import Check
from runtime_py.proof.golden import Difference, ReferenceLogits
from runtime_py.proof.limits import limits_of, walk_id
from runtime_py.proof.plan import ONE_BY_ONE, Plan
from runtime_py.proof.walks import Judge, summarize
from runtime_py.sessions.protocol import Logits, Rewindable, Session, SoftTokens, calls

log = logging.getLogger(__name__)

WALK = "several-logits"


def check_rows(session: Session, plan: Plan, references: Mapping[str, ReferenceLogits], artifact: str) -> list[Check]:
    """Feed ``plan`` to a new ``session``, with the logits of all positions of a call, where the plan has single ids.

    ``references`` are by name. Returns the checks of the first one that the logits agree with; if there is none, of the
    first. A session that gives the logits of one position only has no checks.
    """
    if not isinstance(session, Rewindable) or session.most_logits == 1:
        return []
    log.info("validating .%s in calls that give several logits", artifact)
    differences: dict[str, list[Difference]] = {name: [] for name in references}
    for position, logits in rows(session, plan, list(next(iter(references.values())).soft_tokens)):
        for name, reference in references.items():
            difference = reference.compare(position, logits)
            if difference is not None:
                differences[name].append(difference)
    judged = [_judged(artifact, name, reference, differences[name]) for name, reference in references.items()]
    return next((checks for checks in judged if all(check.passed for check in checks)), judged[0])


def rows(session: Rewindable, plan: Plan, soft_tokens: Sequence[SoftTokens]) -> Iterator[tuple[int, Logits]]:
    """(position, logits [V]) of the text that the walk ONE_BY_ONE feeds by single ids. The rest is only fed.

    ``soft_tokens`` [T, E] are those of each image. (The walks compare what the session makes of the pixels.)
    """
    to_feed = plan.images_to_feed(soft_tokens)
    end = 0
    for single, lengths in groupby(plan.walks[ONE_BY_ONE], lambda length: length == 1):
        start, end = end, end + sum(lengths)
        ids, own = plan.ids[start:end], to_feed[plan.images_between(start, end)]
        if not single:
            session.prefill(ids, own)
            continue
        for call in calls(session, ids, own, text_chunk=session.most_logits):
            if call.image is None:
                yield from enumerate(session.verify(call.ids), session.position - len(call.ids))
            else:
                session.prefill(call.ids, (call.image,))


def _judged(artifact: str, name: str, reference: ReferenceLogits, differences: Sequence[Difference]) -> list[Check]:
    compared = {difference.position for difference in differences}
    if not compared:
        return []
    limits = limits_of(reference.at(compared), name, len(compared))
    metrics = ("max_abs", "kl_mean", "kl_max", "top1_agreement")
    within = {metric: value for metric in metrics if (value := getattr(limits, metric)) is not None}
    return summarize(Judge(artifact, {walk_id(WALK): within}), WALK, differences)
