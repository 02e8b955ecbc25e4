"""What a rehearsal reads from the cache, which may have been deleted since: it is made again, the very same."""

from contextlib import chdir
from pathlib import Path

from ..base import paths, yamlfiles
from ..configs import standin
from ..data import sample
from ..runs.rundir import Run, RunDir


def restore(folder: RunDir, record: Run) -> None:
    """Put back what a rehearsal reads from the cache and is gone from there: the stand-in model, rows of a sample.

    Args:
        folder: the run's.
        record: its record.

    Raises:
        UserError: it cannot be made again as it was.
    """
    if not (record.rehearsal and folder.config.is_file()):
        return
    digests: dict[Path, dict[str, str]] = {}
    for file in record.data:
        digests.setdefault(Path(file.path).parent, {})[Path(file.path).name] = file.sha256
    for made, of_files in digests.items():
        if made.parent == paths.cache() and made.name.startswith("sample-") and not made.is_dir():
            began = record.cwd if Path(record.cwd).is_dir() else "."  # where there may be studies of the user's own
            with chdir(began):
                sample.restore(made, of_files)
    standin.restore(Path(str(yamlfiles.read_yaml(folder.config).get("base_model"))), record.stand_in_sha256)
