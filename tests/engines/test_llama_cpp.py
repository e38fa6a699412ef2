"""The ways to llama.cpp on a one-layer Llama that is written here, with the small vocabulary."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece

from gguf3n.engines import child_process, ggml, llama_library
from gguf3n.engines.child_process import PROGRAM
from gguf3n.engines.llama_cpp import LlamaCpp, LlamaServer, open_llama_cpp
from gguf3n.engines.llama_library import N_BATCH, LlamaLibrary, UnknownLayout, check_parameters
from gguf3n.engines.llama_process import LlamaProcess
from gguf3n.errors import GGUFError, UsageError
from tests.validation.plant_keys import TEMPLATE, set_key
from workshop.checkpoints import TOKENIZER

pytest.importorskip("xllamacpp")

N_VOCAB, N_EMBD, N_FF, N_HEADS = 1024, 64, 128, 2
IDS = [2, *np.random.default_rng(1).integers(494, 1016, 149).tolist()]
TEXT = "The harbour wakes before the town does.\n\nA   <b>little</b> after four."


def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(1)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    pieces = tokenizer()
    kinds = [gguf.TokenType.NORMAL] * N_VOCAB
    for i in range(N_VOCAB):
        if pieces.is_byte(i):
            kinds[i] = gguf.TokenType.BYTE
        elif i < 107:
            kinds[i] = gguf.TokenType.CONTROL
        elif i < 238:
            kinds[i] = gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("llama")
    texts = [pieces.id_to_piece(i) for i in range(N_VOCAB)]
    writer.add_token_list([text.replace("▁", " ") for text in texts[:238]] + texts[238:])
    writer.add_token_scores([-float(i) for i in range(N_VOCAB)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(106)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (N_VOCAB, N_EMBD),
        "blk.0.attn_q": (N_EMBD, N_EMBD),
        "blk.0.attn_k": (N_EMBD, N_EMBD),
        "blk.0.attn_v": (N_EMBD, N_EMBD),
        "blk.0.attn_output": (N_EMBD, N_EMBD),
        "blk.0.ffn_gate": (N_FF, N_EMBD),
        "blk.0.ffn_up": (N_FF, N_EMBD),
        "blk.0.ffn_down": (N_EMBD, N_FF),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[1], dtype=np.float32)
        writer.add_tensor(f"{name}.weight", values)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(model_path, n_ctx=256, n_threads=1) as opened:
        yield opened


def test_distribution_of_every_position(model: LlamaCpp) -> None:
    ids = model.tokenize(TEXT)
    rows = list(model.logprobs(ids))
    assert len(rows) == len(ids)
    for row in rows:
        assert row.shape == (N_VOCAB,)
        assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


def test_every_kind_of_token_can_come_next(model: LlamaCpp) -> None:
    """Tied embeddings make a model repeat itself: after an end mark or half a character, it would pick that again."""
    for last in (0, 1, 3, 106, 107, 366, 493, 1016):
        assert np.isfinite(model.next_token_logprobs([2, last, last, last])).all()


def test_cache_does_not_change_the_distribution(model: LlamaCpp) -> None:
    ids = model.tokenize(TEXT)
    *_, last = model.logprobs(ids)
    assert np.abs(last - model.next_token_logprobs(ids)).max() < 1e-3


def test_tokenize(model: LlamaCpp) -> None:
    assert model.tokenize(TEXT) == [2, *tokenizer().encode(TEXT)]
    assert model.tokenize("hi<end_of_turn>")[-1] == 106
    assert 106 not in model.tokenize("hi<end_of_turn>", special=False)


def test_generate_is_greedy(model: LlamaCpp) -> None:
    ids = model.tokenize("The harbour")
    likely = int(model.next_token_logprobs(ids).argmax())
    assert model.generate(ids, 1) == tokenizer().decode([likely])
    assert model.generate("The harbour", 5) == model.generate(ids, 5)


@pytest.mark.parametrize("n_bytes", [0, 100, 20_000])
def test_truncated_file(n_bytes: int, model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model_path.read_bytes()[:n_bytes])
    with pytest.raises(GGUFError, match=r"cut\.gguf"):
        LlamaCpp(path, n_ctx=256)


# the C API, in this process and in one of its own


@pytest.fixture(scope="module")
def rows(model_path: Path) -> np.ndarray:
    with LlamaLibrary(model_path, n_ctx=256, n_threads=1) as library:
        return np.array(list(library.logprobs(IDS)))


def test_library_says_what_the_server_says(rows: np.ndarray, model: LlamaCpp) -> None:
    """But for the order of additions: the server computes one token at a time, the library many."""
    assert len(IDS) > 2 * N_BATCH
    assert rows.shape == (len(IDS), N_VOCAB)
    assert np.exp(rows.astype(np.float64)).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    served = np.array(list(model.logprobs(IDS, first=len(IDS) - 8)))
    assert np.abs(served - rows[-8:]).max() < 1e-3


def test_only_what_is_asked_for(rows: np.ndarray, model_path: Path) -> None:
    with LlamaLibrary(model_path, n_ctx=256, n_threads=1) as library:
        for first in (N_BATCH - 1, N_BATCH, len(IDS) - 1):  # fewer rows at a time: additions in another order
            found = np.array(list(library.logprobs(IDS, first=first)))
            assert found.shape == rows[first:].shape
            assert np.abs(found - rows[first:]).max() < 1e-4


def test_process_says_what_the_library_says(rows: np.ndarray, model_path: Path) -> None:
    with LlamaProcess(model_path, n_ctx=256, n_threads=1) as process:
        next(process.logprobs(IDS))  # the rest of it must not come again
        assert (np.array(list(process.logprobs(IDS))) == rows).all()
        with pytest.raises(GGUFError, match=r"llama\.gguf: llama\.cpp does not evaluate") as error:
            list(process.logprobs([N_VOCAB + 1]))
        assert "invalid token" in str(error.value)


def test_a_process_that_aborts_is_an_error(model_path: Path) -> None:
    with LlamaProcess(model_path, n_ctx=256, n_threads=1) as process:
        process._child.kill()
        with pytest.raises(GGUFError, match=r"llama\.gguf: llama\.cpp aborts on this file"):
            list(process.logprobs(IDS))


def test_a_file_that_makes_llama_cpp_abort(model_path: Path, tmp_path: Path) -> None:
    """Two tokens of the same text: an assertion of llama.cpp fails."""
    path = tmp_path / "twice.gguf"
    data = model_path.read_bytes()
    piece = b"\x06\0\0\0\0\0\0\0<0xFE>"
    assert data.count(piece) == 1
    path.write_bytes(data.replace(piece, piece.replace(b"FE", b"FF")))
    with pytest.raises(GGUFError, match=r"twice\.gguf: llama\.cpp aborts on this file") as error:
        LlamaProcess(path, n_threads=1)
    assert "GGML_ASSERT" in str(error.value)


@pytest.mark.parametrize("engine", [LlamaLibrary, LlamaProcess])
def test_nothing_reaches_the_terminal(
    engine: type[LlamaLibrary], model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model_path.read_bytes()[:20_000])
    with pytest.raises(GGUFError, match=r"cut\.gguf: llama\.cpp does not load this file") as error:
        engine(path, n_threads=1)
    assert "failed to load model" in str(error.value)
    with engine(model_path, n_threads=1) as opened:
        list(opened.logprobs(IDS[:3]))
    assert capfd.readouterr() == ("", "")


def test_another_version_is_known_by_its_defaults() -> None:
    known = struct.pack("@IIi", 512, 2048, -1)
    fields = (("n_ctx", "I", 512), ("n_batch", "I", 2048), ("flash_attn_type", "i", -1))
    check_parameters("llama_context_params", known, fields)
    inserted = struct.pack("@IIIi", 512, 1, 2048, -1)
    with pytest.raises(UnknownLayout, match=r"llama_context_params\.n_batch is 1, not 2048"):
        check_parameters("llama_context_params", inserted, fields)


def test_another_version_is_run_by_its_server(
    rows: np.ndarray, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which does not look at the file's chat template: it may come to no end."""
    with open_llama_cpp(model_path, n_ctx=256, n_threads=1) as engine:
        assert isinstance(engine, LlamaLibrary)
    monkeypatch.setattr(llama_library, "CONTEXT_FIELDS", (("n_ctx", "I", 513),))
    llama_library.bindings.cache_clear()
    path = Path(shutil.copy(model_path, tmp_path))
    set_key(path, TEMPLATE, "string", "{% no such thing %}")
    with pytest.raises(GGUFError, match="does not load"):
        LlamaCpp(path, n_ctx=256, n_threads=1)
    try:
        with open_llama_cpp(path, n_ctx=256, n_threads=1) as engine:
            assert isinstance(engine, LlamaCpp)
            assert np.abs(np.array(list(engine.logprobs(IDS[:4]))) - rows[:4]).max() < 1e-3
    finally:
        llama_library.bindings.cache_clear()


@pytest.mark.parametrize("engine", [open_llama_cpp, LlamaCpp, LlamaProcess])
def test_without_xllamacpp(engine: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ggml.library.cache_clear()
    llama_library.bindings.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr(child_process, "PROGRAM", f"import sys; sys.modules['xllamacpp'] = None; {PROGRAM}")
    with pytest.raises(UsageError, match=r"gguf3n\[validate\]"):
        engine(model_path)


# a server by its address


def test_server_by_its_address(rows: np.ndarray, model: LlamaCpp) -> None:
    server = LlamaServer(model.url + "/")
    assert server.name == f"llama-server at {model.url}"
    assert np.abs(np.array(list(server.logprobs(IDS[:12], first=8))) - rows[8:12]).max() < 1e-3


def test_a_text_too_long_for_the_server_is_refused(model: LlamaCpp) -> None:
    with pytest.raises(UsageError, match="the server refuses") as error:
        list(LlamaServer(model.url).logprobs([2] * 300, first=299))
    assert "context" in str(error.value)


class Answers(http.server.BaseHTTPRequestHandler):
    """Another server than llama-server, or one of another mind."""

    def do_GET(self) -> None:
        self.answer(200, b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        candidates = {"id": 0, "logprob": 0.0}, {"id": 3, "logprob": -1.0}
        match self.path.split("/")[1]:
            case "key":
                self.answer(200 if self.headers["Authorization"] == "Bearer sesame" else 401, b"{}")
            case "text":
                self.answer(200, b"<html>")
            case "part":
                step = {"top_logprobs": candidates}
                self.answer(200, json.dumps({"completion_probabilities": [step]}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def others() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("key", r"(?s)key/completion: the server refuses.*401.*LLAMA_API_KEY"),
        ("text", "text/completion: not a llama-server"),
        ("part", "does not return the whole vocabulary"),
    ],
)
def test_servers_that_cannot_be_used(path: str, message: str, others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    with pytest.raises(UsageError, match=message):
        list(LlamaServer(f"{others}/{path}").logprobs([2]))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_answers_is_no_llama_server(answer: bytes) -> None:
    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        with pytest.raises(UsageError, match="/health: not a llama-server"):
            LlamaServer(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:port", "http://a b"])
def test_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="not a llama-server"):
        LlamaServer(url)


def test_a_key_is_sent(others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "sesame")
    with pytest.raises(UsageError, match="does not return the whole vocabulary"):
        list(LlamaServer(f"{others}/key").logprobs([2]))


def test_no_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(UsageError, match="no answer"):
            LlamaServer(f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(UsageError, match="not an address"):
        LlamaServer("localhost:8080")
