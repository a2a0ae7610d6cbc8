"""Opens sessions that guess ahead: from the text so far, or with a second, smaller model."""

from pathlib import Path

from export.manifest import Manifest, read_manifest
from gemma3.errors import BadInput
from runtime_py.backends import backend_of, open_graph
from runtime_py.drafters import DraftModel, PromptLookup
from runtime_py.sessions.protocol import Rewindable, Session
from runtime_py.sessions.speculative import Drafter, SpeculativeSession


def check_draft(bundle: Path, draft: Path) -> None:
    """Raises BadInput unless ``draft`` is a bundle with the tokenizer of ``bundle``: its guesses are token ids."""
    wanted, found = (read_manifest(one).tokenizer.sha256 for one in (bundle, draft))
    if found != wanted:
        raise BadInput(
            f"{draft}: its tokenizer has the sha256 {found[:12]}…, that of {bundle} {wanted[:12]}…; "
            "a draft model must have the same tokenizer"
        )


def open_speculative(bundle: Path, format: str, draft: Path | None, threads: int | None) -> SpeculativeSession:
    """A session over the graph of ``format`` in ``bundle``. It guesses by the bundle ``draft``; by lookup if None.

    Of the draft model, the graph of the same format runs if it has one, else its first. Raises BadInput when the graph
    gives the logits of one position only, for a draft model with another tokenizer, and as ``open_session`` does.
    """
    if draft is not None:
        check_draft(bundle, draft)
    manifest = read_manifest(bundle)
    session = _rewindable(bundle, manifest, format, threads)
    drafter: Drafter = PromptLookup()
    if draft is not None:
        smaller = read_manifest(draft)
        own = format if format in smaller.artifacts else next(iter(smaller.artifacts))
        # A step reads all weights once, so it takes about as long as the file is large.
        cost = smaller.artifacts[own].bytes / manifest.artifacts[format].bytes
        drafter = DraftModel(_rewindable(draft, smaller, own, threads), cost)
    return SpeculativeSession(session, drafter, backend_of(format).extra_cost)


def _rewindable(bundle: Path, manifest: Manifest, format: str, threads: int | None) -> Rewindable:
    session: Session = open_graph(bundle, manifest, backend_of(format), threads)
    if not isinstance(session, Rewindable) or session.most_logits == 1:
        raise BadInput(
            f"{bundle}: a call of its .{format} gives the logits of one position only, so guesses cannot be checked; "
            "export it again, with a --chunk over 1"
        )
    return session
