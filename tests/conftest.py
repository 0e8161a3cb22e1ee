"""Every test gets its own home and no network but loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads wait by spinning, which costs all that runs beside
for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL", "HOMINEM_INFERENCE_KEY"):
    os.environ.pop(name, None)

import hominem_mlx  # noqa: E402, I001  before mlx, so that it can take OpenBLAS
import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from hominem_mlx.data import dataset  # noqa: E402
from hominem_mlx.data import home as homes  # noqa: E402
from hominem_mlx.data.split import split_of  # noqa: E402
from hominem_mlx.files import read_jsonl, write_jsonl  # noqa: E402
from hominem_mlx.models import backbone  # noqa: E402
from hominem_mlx.records import Fixture, Label, Prompt, RecallQuestion, SftPair  # noqa: E402
from hominem_mlx.storage.registry import Registry  # noqa: E402

# A machine may be busy, and how long an example takes is not what these tests are about.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Of several processes these are begun first; test_full before a process has run others, because after those that follow
# here MLX's peak was seen to be a tenth lower than the estimate it is held against allows for (not yet explained).
FIRST = ["test_demo", "test_full", "test_rl_figure", "test_kill", "test_parallel"]
TEXT = [
    "What is my sister called? Your sister is called Nora.",
    "I feel tired today. That sounds heavy; what would help you most right now?",
    "Is the earth flat? No, it is round, and ships have sailed around it.",
    "Tell me what to do. You could ask her, or wait a day; which feels right to you?",
]


def pytest_report_header():
    """Which BLAS: without OpenBLAS everything is right and some thirty times slower."""
    return f"BLAS: {hominem_mlx.openblas or 'of the MLX wheel'}"


class Demo(subprocess.Popen):
    """`hominem demo` as a person starts it, in a home of its own; what it prints goes to the file `output`."""

    def __init__(self, folder: Path):
        self.home, self.output = folder / "home", folder / "output"
        command = [sys.executable, "-c", "from hominem_mlx.cli import main; main()", "demo", "--home", self.home]
        with open(self.output, "w") as output:
            json_file = self.home / "demo.json"
            super().__init__([*command, "--json", json_file], stdout=output, stderr=output, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def demo_process(tmp_path_factory):
    """A whole demo. It takes minutes and seldom all cores; how long it takes beside other tests says nothing."""
    with Demo(tmp_path_factory.mktemp("demo")) as process:
        yield process
        process.kill()


def is_alone(config) -> bool:
    """Whether this process runs all tests, not one of several at the same time."""
    return not hasattr(config, "workerinput")


def asks_for_the_demo(item) -> bool:
    return "demo_process" in item.fixturenames


@pytest.fixture(scope="session", autouse=True)
def demo_beside_the_others(request):
    """Where one process runs all tests, the demo begins with the first if a later one asks what it finds."""
    if is_alone(request.config) and any(map(asks_for_the_demo, request.session.items)):
        request.getfixturevalue("demo_process")


def pytest_collection_modifyitems(config, items):
    """Alone: what waits for the demo comes last. Of several processes one waits, from the first moment on, and the
    longest files come next, so that none of them is what all others wait for in the end.
    """
    if is_alone(config):
        items.sort(key=asks_for_the_demo)
    else:
        items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections leave this machine nowhere."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder, which is also `$HOMINEM_HOME`."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOMINEM_HOME", str(folder))
    return folder


@pytest.fixture
def registry(home) -> Registry:
    """An empty registry."""
    return Registry(home)


@pytest.fixture
def publish_pairs(registry):
    """Publishes a dataset of pairs: `publish_pairs(pairs, valid, memories, thumbs)`."""

    def make(pairs=(), valid=(), memories=(), thumbs=None):
        with registry.draft("dataset", config={"holds": "pairs"}) as draft:
            write_jsonl(draft.folder / "preferences.train.jsonl", pairs)
            write_jsonl(draft.folder / "preferences.valid.jsonl", valid)
            write_jsonl(draft.folder / "memory.jsonl", memories)
            if thumbs is not None:
                write_jsonl(draft.folder / "thumbs.jsonl", thumbs)
        return draft.published

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Qwen3-shaped model with random weights: hidden 32, 2 blocks, byte-level BPE."""
    from mlx_lm.models import qwen3
    from mlx_lm.utils import save_config, save_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
    fast.save_pretrained(folder)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(fast),
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": fast.convert_tokens_to_ids("<|im_end|>"),
    }
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    save_model(folder, model)
    save_config(dict(config), folder / "config.json")
    return folder


@pytest.fixture
def tiny(tiny_folder, tmp_path):
    """Makes fresh copies of the random model: `tiny()`."""

    def make() -> backbone.LanguageModel:
        folder = tmp_path / "tiny"
        if not folder.exists():
            shutil.copytree(tiny_folder, folder)
        return backbone.load(str(folder))

    return make


@pytest.fixture
def student() -> backbone.LanguageModel:
    """The bundled tiny student, freshly loaded."""
    return backbone.load("starter")


@pytest.fixture(scope="session")
def share_of_starter(tmp_path_factory):
    """Makes a folder like that of the bundled corpus, with the first so many of its rows."""

    def make(*, memory: int, recall: int, fixtures: int, **prompts: int) -> Path:
        """`prompts` by split, each with all that is said to it."""
        folder, kept = tmp_path_factory.mktemp("starter"), set()
        every = read_jsonl(homes.STARTER / "prompts.jsonl", Prompt)
        for part, count in prompts.items():
            kept.update([prompt.id for prompt in every if split_of(prompt.id) == part][:count])
        write_jsonl(folder / "prompts.jsonl", [row for row in every if row.id in kept])
        for name in ("reward_samples.jsonl", dataset.RETESTS):
            labels = read_jsonl(homes.STARTER / name, Label)
            write_jsonl(folder / name, [row for row in labels if row.prompt_id in kept])
        for name, model, count in (
            ("memory", SftPair, memory),
            ("recall", RecallQuestion, recall),
            ("fixtures", Fixture, fixtures),
        ):
            write_jsonl(folder / f"{name}.jsonl", read_jsonl(homes.STARTER / f"{name}.jsonl", model)[:count])
        return folder

    return make


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows (dicts, or raw lines) to a JSONL file and returns its path."""

    def write(name: str, rows) -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
