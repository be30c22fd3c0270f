"""Downloads the model and the data of a run, if they are names on the hub, into the caches of this machine.

train_32b.sh runs it once on every node, with the settings of `fipo.py train`. Its ranks then start with
HF_HUB_OFFLINE=1 and read the caches, so that 64 ranks do not all ask the hub.
"""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from plan import fipo, is_local, settings_of


def fetch(argv: list[str]) -> None:
    cfg = settings_of(argv)
    if not Path(cfg.model).is_dir():
        with fipo.user_error(f"downloading the model {cfg.model!r}"):
            snapshot_download(cfg.model)
    for source in filter(None, (cfg.data, cfg.eval_data)):
        # Offline, `datasets` finds only data that it has already prepared: a downloaded snapshot is not enough.
        if not is_local(source):
            fipo.load_problems(source)


if __name__ == "__main__":
    with fipo.report_errors():
        fetch(sys.argv[1:])
