"""Whether the hub can be asked at all: its client tries again for half a minute before it says that it cannot."""

from __future__ import annotations

from pathlib import Path

SECONDS = 5
"""How long the hub may take to answer."""


def why_unreachable(kind: str, name: str) -> str | None:
    """Return why a `model` or `dataset` cannot be fetched from the hub, in a few words, or None if it may be tried.

    What is in the local cache, if but in part, and what is asked for in offline mode is left to the libraries.
    """
    from huggingface_hub import constants, get_session, is_offline_mode
    from huggingface_hub.file_download import repo_folder_name

    cached = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)]
    if kind == "dataset":
        from datasets import config

        cached.append(Path(config.HF_DATASETS_CACHE) / name.replace("/", "___"))
    if is_offline_mode() or any(folder.exists() for folder in cached):
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the network, of a proxy, of whatever library the client stands on
        return f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
    return None
