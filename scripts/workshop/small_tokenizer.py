"""The small tokenizer of the fixtures: Gemma's vocabulary in miniature, 1,024 pieces.

Ids 0 to 493 are Gemma's own: the five special pieces, the unused ones, the turn marks, runs of newlines and of spaces,
HTML tags, 256 bytes. Then come the learned pieces (merges first, single characters last), and at the end, where the
full-size vocabulary has 255999 and 256000, the marks that begin an image and a sound. As in the full-size model a
piece's score is minus its id: the lower id is merged first. The tokens of the other modalities, from 1024 up, stand
only in the JSON files.
"""

from __future__ import annotations

import io
import json
from typing import Any

from workshop.places import FIXTURES

TEXTS = ("english.txt", "multilingual.txt")

N_PIECES = 1024
N_VISION_TOKENS = 32

_TAGS = (
    ("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"),
    ("h1", "h2", "h3", "h4", "h5", "h6", "blockquote"),
    ("strong", "em", "b", "i", "u", "s", "sub", "sup", "code"),
    ("a", "html", "body", "img", "span", "bbox", "ul", "li", "div", "iframe", "footer"),
)

# ids 4 to 237, in order
USER_DEFINED = (
    "<mask>",
    "[multimodal]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    *("\n" * n for n in range(1, 32)),
    *("▁" * n for n in range(2, 32)),
    *(f"<{slash}{tag}>" for group in _TAGS for slash in ("", "/") for tag in group),
)
FIRST_BYTE = 4 + len(USER_DEFINED)  # 238
FIRST_LEARNED = FIRST_BYTE + 256  # 494

# ids 1016 to 1023, after everything that was learned
LAST = ("<start_of_image>", "<start_of_audio>", *(f"<unused{i}>" for i in range(99, 105)))

# tokens without a piece: id -> content
BEYOND_PIECES = {
    N_PIECES: "<end_of_image>",
    N_PIECES + 1: "<image_soft_token>",
    N_PIECES + N_VISION_TOKENS: "<end_of_audio>",
    N_PIECES + N_VISION_TOKENS + 1: "<audio_soft_token>",
}

SPECIAL = {
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<start_of_audio>"),
    *BEYOND_PIECES.values(),
}

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set system = "" %}
{%- if messages and messages[0].role == "system" %}
    {%- set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}
    {%- set system = system + "\\n\\n" %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate: user, assistant, user, ...") }}
    {%- endif %}
    {{- "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" }}
    {{- system if loop.first }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == "image" %}{{ "<image_soft_token>" }}
            {%- elif part.type == "audio" %}{{ "<audio_soft_token>" }}
            {%- elif part.type == "text" %}{{ part.text | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<start_of_turn>model\\n" }}
{%- endif %}
"""

GENERATION_CONFIG = {
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "do_sample": True,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "4.53.0",
}


def train() -> Any:
    """The sentencepiece ModelProto of 1,024 pieces."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    lines = [line for name in TEXTS for line in (FIXTURES / "text" / name).read_text("utf-8").splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_PIECES - len(LAST),
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=list(USER_DEFINED),
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    for piece in LAST:
        proto.pieces.add(piece=piece, type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    return finish(proto)


def finish(proto: Any) -> Any:
    """Scores of minus the id, and only those trainer settings that describe the model."""
    for i, piece in enumerate(proto.pieces):
        piece.score = -float(i)
    settings = type(proto.trainer_spec)()
    settings.model_type = proto.trainer_spec.BPE
    settings.vocab_size = len(proto.pieces)
    settings.byte_fallback = True
    settings.unk_id, settings.bos_id, settings.eos_id, settings.pad_id = 3, 2, 1, 0
    proto.trainer_spec.CopyFrom(settings)
    return proto


def merges(vocab: dict[str, int]) -> list[list[str]]:
    """Every way to join two pieces into a third, in the order in which sentencepiece would do it."""
    found = []
    for piece, rank in vocab.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += [(rank, len(left), left, right) for left, right in splits if left in vocab and right in vocab]
    return [[left, right] for _, _, left, right in sorted(found)]


def added_tokens(pieces: list[str], beyond: dict[int, str]) -> dict[int, dict[str, Any]]:
    """The tokens that are cut out of the text before any merge: id -> entry of tokenizer_config.json."""
    ids = {i: p for i, p in enumerate(pieces) if i < FIRST_BYTE or p in SPECIAL or p.startswith("<unused")} | beyond
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {i: {"content": content, **flags, "special": content in SPECIAL} for i, content in sorted(ids.items())}


def tokenizer_json(pieces: list[str], beyond: dict[int, str]) -> dict[str, Any]:
    """The same vocabulary in the form of Hugging Face tokenizers.

    Why: the tokens beyond the pieces are listed in the vocabulary too, because the library numbers an added token that
    is not there by counting on, and theirs have gaps.
    """
    ranks = {piece: i for i, piece in enumerate(pieces)}
    vocab = ranks | {content: i for i, content in beyond.items()}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **entry} for i, entry in added_tokens(pieces, beyond).items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(ranks),
        },
    }


def tokenizer_config(pieces: list[str], beyond: dict[int, str]) -> dict[str, Any]:
    """tokenizer_config.json in the published style."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): entry for i, entry in added_tokens(pieces, beyond).items()},
        "audio_token": "<audio_soft_token>",
        "boa_token": "<start_of_audio>",
        "boi_token": "<start_of_image>",
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eoa_token": "<end_of_audio>",
        "eoi_token": "<end_of_image>",
        "eos_token": "<eos>",
        "extra_special_tokens": {
            "audio_token": "<audio_soft_token>",
            "boa_token": "<start_of_audio>",
            "boi_token": "<start_of_image>",
            "eoa_token": "<end_of_audio>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "image_token": "<image_soft_token>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "processor_class": "Gemma3nProcessor",
        "sp_model_kwargs": None,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def special_tokens_map() -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {
        "audio_token": "<audio_soft_token>",
        "boa_token": "<start_of_audio>",
        "boi_token": "<start_of_image>",
        "bos_token": {"content": "<bos>", **flags},
        "eoa_token": "<end_of_audio>",
        "eoi_token": "<end_of_image>",
        "eos_token": {"content": "<eos>", **flags},
        "image_token": "<image_soft_token>",
        "pad_token": {"content": "<pad>", **flags},
        "unk_token": {"content": "<unk>", **flags},
    }
    return named


def as_json(value: Any, indent: int | None = 2) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent) + "\n"


def tokenizer_files(proto: Any, beyond: dict[int, str]) -> dict[str, bytes]:
    """File name -> contents, for a vocabulary of any size."""
    pieces = [piece.piece for piece in proto.pieces]
    texts = {
        "tokenizer.json": as_json(tokenizer_json(pieces, beyond), indent=None if len(pieces) > N_PIECES else 1),
        "tokenizer_config.json": as_json(tokenizer_config(pieces, beyond)),
        "special_tokens_map.json": as_json(special_tokens_map()),
        "chat_template.jinja": CHAT_TEMPLATE,
        "generation_config.json": as_json(GENERATION_CONFIG),
    }
    model: bytes = proto.SerializeToString(deterministic=True)
    return {"tokenizer.model": model} | {name: text.encode("utf-8") for name, text in texts.items()}
