"""The tokenizer of a run or a checkpoint: of all verbs that read or write text."""

from pathlib import Path

from data.dataset import TokenDataset
from data.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from minimax_train.model.config import ModelConfig
from minimax_train.train.folder import RunFolder

TRAVELLED = "hugging_face"
"""Inside a checkpoint: what came with the weights that `convert from-hf` read."""


def find_tokenizer(path: Path, given: Path | None, model: ModelConfig) -> Tokenizer:
    """`given`, or what made the held-out tokens of the run that `path` is or lies in, or what came with the checkpoint `path`.

    ValueError where there is none, or it has ids that the model does not know.
    """
    tokenizer = load_tokenizer(given) if given else _own(path)
    if tokenizer is None:
        raise ValueError(f"{path}: neither a run with token files nor a checkpoint with {TRAVELLED}/{FILE_NAME}: say --tokenizer T")
    if tokenizer.vocabulary > model.vocab_size:
        raise ValueError(
            f"the tokenizer {given or 'of ' + str(path)} has {tokenizer.vocabulary} ids, the model {model.vocab_size}: give the model's own"
        )
    return tokenizer


def has_tokenizer(path: Path) -> bool:
    """Whether a run or a checkpoint brings one itself."""
    return run_of(path) is not None or (path / TRAVELLED / FILE_NAME).is_file()


def run_of(path: Path) -> RunFolder | None:
    """The run that `path` is, or whose checkpoint it is; None where it is a checkpoint by itself."""
    for folder in (path, path.resolve().parent.parent):
        run = RunFolder(folder)
        if run.plan.is_file() and (folder == path or path.resolve().parent == run.checkpoints.resolve()):
            return run
    return None


def _own(path: Path) -> Tokenizer | None:
    run = run_of(path)
    if run is not None:
        return TokenDataset.open(run.load_plan().data.validation).tokenizer()
    came = path / TRAVELLED
    return load_tokenizer(came) if (came / FILE_NAME).is_file() else None
