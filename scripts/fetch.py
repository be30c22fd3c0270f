"""Downloads the model and the data of a run into the caches of this machine.

Only names on the hub are downloaded. train_32b.sh calls it once on every node, with the settings of
`fipo.py train`. The ranks then start with HF_HUB_OFFLINE=1 and read the caches, so that 64 ranks do
not all ask the hub.
"""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from plan import fipo, is_local, settings_of


def fetch(argv: list[str]) -> None:
    """Download what the settings name."""
    cfg = settings_of(argv)
    if not Path(cfg.model).is_dir():
        with fipo.user_error(f"downloading the model {cfg.model!r}"):
            snapshot_download(cfg.model)
    for source in (cfg.data, cfg.eval_data):
        # Offline, `datasets` finds only data that it has prepared. A snapshot is not enough.
        if source and not is_local(source):
            fipo.load_problems(source)


if __name__ == "__main__":
    with fipo.report_errors():
        fetch(sys.argv[1:])
