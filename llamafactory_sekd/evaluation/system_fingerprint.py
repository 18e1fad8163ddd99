"""What decides a system's translations, condensed to one SHA-256.

Files count by content, not by name or date, so a model may be moved or copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llamafactory_sekd.errors import EvaluationError
from llamafactory_sekd.evaluation.evaluation_settings import Decoding, System
from llamafactory_sekd.evaluation.translator import Description, ModelSource, Request
from llamafactory_sekd.fingerprints import Digests, sha256_of_json


_LOCATION_KEYS = ("model_name_or_path", "adapter_name_or_path")


def source_digests(source: ModelSource, system: str, digests: Digests) -> dict[str, str]:
    """Return ``{file: SHA-256}`` of a directory's model files, or the commit of a hub repository."""
    place = locate(source, system)
    return {"hub": place} if isinstance(place, str) else digests.of_model(place)


def locate(source: ModelSource, system: str) -> Path | str:
    """Return the directory of a model, or ``repository@commit`` where it comes from the hub.

    Raises :class:`EvaluationError`, naming the ``system``, when there is no model there.
    """
    folder = Path(source.location)
    if not folder.is_dir():
        return f"{source.location}@{_hub_commit(source, system)}"
    if not (folder / source.config).is_file():
        raise EvaluationError(f"`systems.{system}`: {folder} has no {source.config}, so it holds no model.")
    return folder


def _hub_commit(source: ModelSource, system: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        config = hf_hub_download(source.location, source.config, revision=source.revision)
    except HFValidationError:
        raise EvaluationError(f"`systems.{system}`: the directory {source.location} does not exist.") from None
    except Exception as error:
        # The hub's client raises dozens of types: no network, no such repository, no permission.
        reason = str(error).strip().split("\n")[0]
        raise EvaluationError(
            f"`systems.{system}`: {source.location} is neither a directory nor available on the Hub ({reason})."
        ) from None
    return Path(config).parent.name


def system_fingerprint(
    system: System,
    description: Description,
    decoding: Decoding,
    requests: Sequence[Request],
    digests: Digests,
    versions: dict[str, str],
) -> str:
    """Return the SHA-256 of all that decides how ``system`` answers ``requests`` (prompts before the template)."""
    arguments = {key: value for key, value in (system.model or {}).items() if key not in _LOCATION_KEYS}
    return sha256_of_json(
        {
            "sources": [source_digests(source, system.name, digests) for source in description.sources],
            "arguments": arguments,
            "template": description.template,
            "decoding": asdict(decoding),
            "messages": [[one.message, *one.examples] if one.examples else one.message for one in requests],
            "versions": versions,
        }
    )


def lines_fingerprint(lines: Sequence[str]) -> str:
    """Return the fingerprint of translations that came from elsewhere."""
    return sha256_of_json({"lines": list(lines)})
