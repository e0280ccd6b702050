"""What keeps a command out of a folder that another run is using, before Hydra records its settings there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf.errors import OmegaConfBaseException

from mavis.distributed import launcher_rank
from mavis.errors import DataError
from mavis.utils.files import refuse_model_folder
from mavis.utils.locks import locked_folder


class RefuseFolderInUse(Callback):
    """Ends a command before Hydra writes `.hydra/` into the folder of a run that is going on.

    The run itself takes the lock later, when it has loaded what it needs.
    """

    def on_run_start(self, config: Any, **kwargs: Any) -> None:
        """Try the lock of the output folder; Hydra calls this once, in a single run."""
        if launcher_rank() != 0:  # writes nothing
            return
        try:
            folder = Path(config.hydra.run.dir)
        except OmegaConfBaseException:  # without a folder: the command itself says what is missing
            return
        try:
            refuse_model_folder(folder)
            with locked_folder(folder):
                pass
        except DataError as error:  # which Hydra would turn into a warning
            print(f"mavis: {error}", file=sys.stderr)
            sys.exit(2)
