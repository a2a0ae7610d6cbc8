"""Single steps of a .pte, each compared with the reference that begins with the file's own cache.

Fed freely, a file that multiplies in int8 and its reference drift apart once a value has been rounded the other way:
what it changed stays in the cache and turns further roundings. One step from the same cache has no such past. Unless
one of its own values lies within float error of a rounding boundary, it agrees as float32 does, so these figures show
whether anything but such roundings differs.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import numpy as np
import torch

from export.manifest import Check, Format, Manifest
from gemma3.model import Gemma3, LayerKV
from quant.recipe import QuantizedWeights
from runtime_py.eager_session import open_own
from runtime_py.golden import FULL_VOCABULARY, Difference, Recorder, Reference
from runtime_py.plan import GOLDEN_NEAR, ONE_BY_ONE, Plan, make_plan, near
from runtime_py.pte_session import PteSession
from runtime_py.session import import_runtime, pieces
from runtime_py.validate import limited, limits_for, with_noise_limits

log = logging.getLogger(__name__)

FLOAT_AGREEMENT = 1e-4  # a step whose logits are this near had no value rounded the other way


def check_own_cache(
    bundle: Path, manifest: Manifest, weights: Mapping[Format, QuantizedWeights], references: Mapping[str, Reference]
) -> list[Check]:
    """The checks of ``bundle``'s .pte, if it multiplies in int8. A small model is looked at after every id, a large
    one around the plan's landmarks: each step costs one of the eager model's.
    """
    artifact = manifest.artifacts.get("pte")
    if artifact is None or artifact.reference_activations != "int8":
        return []
    plan = make_plan(manifest)
    looked_at = set(range(len(plan.ids)))
    if manifest.model.vocab_size > FULL_VOCABULARY:
        looked_at = set(near(plan.landmarks.values(), GOLDEN_NEAR, len(plan.ids)))
    log.info("validating .pte from its own cache at %d positions", len(looked_at))
    session = import_runtime("pte")(bundle / artifact.file, artifact.cache, manifest.model, None)
    assert isinstance(session, PteSession)
    model = open_own(manifest, "pte", weights["pte"]).model
    differences = list(steps(session, model, plan, looked_at))
    limits = with_noise_limits(limits_for(manifest, "pte"), references["int8"], len(differences))
    kl = [difference.kl for difference in differences]
    agree = sum(difference.max_abs <= FLOAT_AGREEMENT for difference in differences) / len(differences)
    figures = {"kl_mean": sum(kl) / len(kl), "kl_median": median(kl), "kl_max": max(kl), "float_equal": agree}
    name = f"{ONE_BY_ONE}, each from the file's own cache ({len(kl)} positions)"
    return [limited("pte", name, metric, value, limits) for metric, value in figures.items()]


def steps(session: PteSession, model: Gemma3, plan: Plan, looked_at: set[int]) -> Iterator[Difference]:
    """Feed ``plan`` to a new ``session``, text one by one; at the positions ``looked_at`` the model steps from the
    same cache. Both are fed the soft tokens that the file makes.
    """
    shown = plan.shown_images([session.encode_image(image) for image in plan.images])
    for piece in pieces(session, plan.ids, shown, text_chunk=1):
        images = () if piece.image is None else (piece.image,)
        start, last = session.position, session.position + len(piece.ids) - 1
        if last not in looked_at:
            session.prefill(piece.ids, images)
            continue
        cache = file_cache(session, model.config.num_layers)
        soft_tokens = torch.from_numpy(np.stack(images)) if images else None
        with torch.inference_mode():
            tokens = torch.tensor([piece.ids])
            expected = model(tokens, cache, start, last_only=True, soft_tokens=soft_tokens)[0, 0].numpy()
        recorder = Recorder(plan.ids, session.vocab_size)
        recorder.add(last, expected)
        difference = recorder.reference().compare(last, session.prefill(piece.ids, images))
        assert difference is not None
        yield difference


def file_cache(session: PteSession, layers: int) -> list[LayerKV]:
    """Copies of the file's caches as gemma3.model keeps them: [1, K, slots, D]."""
    pairs = (session.cache(layer) for layer in range(layers))
    return [LayerKV(*(torch.from_numpy(part).transpose(1, 2).contiguous() for part in pair)) for pair in pairs]
