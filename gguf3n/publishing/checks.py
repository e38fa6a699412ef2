"""What a repository of GGUF files can have wrong, as llama.cpp, the Hub and Ollama will see it: a table of checks.

Names of files are looked at, and the small files beside them; `gguf3n lint FILE` looks into the large ones.

Source: as labels.py; hub-docs, model-cards.md, ollama.md; api/types.go of Ollama for parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gguf.constants import Keys

from gguf3n.errors import Gguf3nError, GGUFError
from gguf3n.formats.gguf_reader import LFS_POINTER, open_gguf
from gguf3n.formats.hub import file_hash
from gguf3n.gemma3n.mmproj import ARCH as ENCODERS
from gguf3n.inspection.found import Found, absent, said
from gguf3n.inspection.lint import MAX_FINDINGS, Check, Group, Report, Severity
from gguf3n.inspection.summary import architecture
from gguf3n.publishing import front_matter, labels, terms
from gguf3n.publishing.checksums import SUMS, parse_sums
from gguf3n.publishing.ollama import HUB_PARAMS, HUB_SYSTEM, HUB_TEMPLATE
from gguf3n.publishing.repository import Repository, open_repository

CARD, NOTICE_FILE, PRESET = "README.md", "Notice", "preset.ini"
MMPROJ = "mmproj-"
NO_MODEL_TYPES = ("mmproj", "imatrix", "adapter")
"""general.type of files that are rightly called no models."""

TEXT, IMAGES = "text-generation", "image-text-to-text"
"""Tasks of the Hub: without an mmproj file and with one."""

NUMBERS, TEXTS = (int, float), (str,)
PARAMETERS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("num_ctx", "num_predict", "num_keep", "num_batch", "num_gpu", "num_thread", "main_gpu", "seed", "top_k",
         "repeat_last_n", "temperature", "top_p", "min_p", "typical_p", "tfs_z", "repeat_penalty", "presence_penalty",
         "frequency_penalty", "mirostat", "mirostat_tau", "mirostat_eta"),
        NUMBERS,
    ),
    "stop": (list, str),
}  # fmt: skip
"""What `params` may hold, and of what type."""

OPENS, CLOSES, MIDDLE = ("if", "range", "with", "block", "define"), ("end",), ("else",)
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)[\"']", re.IGNORECASE)
TAGGED = re.compile(r"(?:-hf(?:-repo)?[ =]|hf\.co/)([\w.-]+/[\w.-]+):([\w.-]+)")
OTHER_PLACE = re.compile(r"[a-z][a-z0-9+.-]*:|#|//", re.IGNORECASE)
HUB_FILE = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)/(?:blob|resolve|raw)/[^/]+/(?P<path>.+)"
)


class Seen:
    """A repository, and what several checks want of it, each found out once."""

    def __init__(self, repository: Repository, *, with_data: bool = False) -> None:
        self.repository = repository
        self.paths = labels.listed(repository.sizes)
        self.with_data = with_data

    @cached_property
    def models(self) -> list[str]:
        """Files that llama.cpp takes for models; of a split one its first part."""
        return [path for path in self.paths if labels.is_model(path) and labels.is_first(path)]

    @cached_property
    def by_label(self) -> dict[str, list[str]]:
        """The models of each label."""
        return dict(islice(labels.tags(self.paths).items(), MAX_FINDINGS))

    @cached_property
    def mmprojs(self) -> list[str]:
        return [path for path in self.paths if path.endswith(labels.SUFFIX) and "mmproj" in labels.file_name(path)]

    @cached_property
    def card(self) -> str | None:
        return self.text(CARD)

    @cached_property
    def front(self) -> dict[str, Any] | str:
        """What the card's front matter says, or why it says nothing."""
        try:
            return front_matter.parse(self.card or "")
        except ValueError as error:
            return str(error)

    def text(self, path: str) -> str | None:
        """A small file; None where there is none."""
        if path not in self.repository.sizes:
            return None
        return self.repository.read(path).decode("utf-8", "replace")


Find = Callable[[Seen], Iterator[Found]]


def no_model(seen: Seen) -> Iterator[Found]:
    if not seen.models:
        yield Found(seen.repository.name, "has no GGUF file with a model's name")


def hidden_models(seen: Seen) -> Iterator[Found]:
    """Why by the header where there is one: an importance matrix may be named after the file it was measured on."""
    for path in seen.paths:
        word = labels.hidden_by(path)
        if word is None or not path.endswith(labels.SUFFIX) or labels.file_name(path).startswith(word):
            continue
        if _is_model_inside(seen.repository, path):
            yield Found(path, f"has {word!r} in its name")


def _is_model_inside(repository: Repository, path: str) -> bool:
    """Goes by a label in the name where there is no header to read."""
    try:
        gguf = None if repository.directory is None else open_gguf(repository.directory / path, strict=False)
    except GGUFError:  # lint FILE says what is wrong with it
        gguf = None
    if gguf is None:
        return labels.hub_label(path) is not None
    kind = gguf.keys.get(Keys.General.TYPE)
    return architecture(gguf) != ENCODERS and (kind is None or kind.value not in NO_MODEL_TYPES)


def no_label(seen: Seen) -> Iterator[Found]:
    for path in seen.models:
        if labels.hub_label(path) is None:
            yield said(path, path)


def same_label(seen: Seen) -> Iterator[Found]:
    for label, paths in seen.by_label.items():
        if len(paths) > 1:
            yield Found(label, f"is the label of {' and of '.join(paths)}")


def other_file(seen: Seen) -> Iterator[Found]:
    for label, paths in seen.by_label.items():
        given = labels.llama_cpp_file(seen.paths, label)
        if given is not None and given not in paths:
            yield Found(f":{label}", f"gives {given} in llama.cpp, not {paths[0]}")


def unreachable(seen: Seen) -> Iterator[Found]:
    for label, paths in seen.by_label.items():
        if labels.llama_cpp_file(seen.paths, label) is None:
            yield Found(paths[0], f"is not found by :{label}")


def borrowed_tag(seen: Seen) -> Iterator[Found]:
    found = seen.by_label
    for label in found:
        plain = label.removeprefix("UD-")
        given = labels.llama_cpp_file(seen.paths, plain)
        if plain not in found and given is not None:
            yield Found(f":{plain}", f"gives {given} in llama.cpp, and nothing in Ollama")


def no_default(seen: Seen) -> Iterator[Found]:
    found = seen.by_label
    if seen.models and labels.DEFAULTS[0] not in found:
        given = labels.llama_cpp_file(seen.paths)
        yield said("no tag", f"no {labels.DEFAULTS[0]}: without a tag llama.cpp gives {given}")


def split_models(seen: Seen) -> Iterator[Found]:
    for path in seen.models:
        if (place := labels.split_part(path)) is not None and place[1] > 1:
            yield Found(path, f"is the first of {place[1]} parts")


def missing_parts(seen: Seen) -> Iterator[Found]:
    groups: dict[tuple[str, int], set[int]] = {}
    for path in seen.paths:
        found = labels.SPLIT.fullmatch(path)
        if found is not None and 0 < int(found["count"]) <= MAX_FINDINGS:
            groups.setdefault((found["prefix"], int(found["count"])), set()).add(int(found["index"]))
    for (prefix, count), there in groups.items():
        for index in sorted(set(range(1, count + 1)) - there):
            yield absent(f"{prefix}-{index:05d}-of-{count:05d}.gguf")


def preset(seen: Seen) -> Iterator[Found]:
    if PRESET in seen.repository.sizes:
        yield said(PRESET, PRESET)


def lfs_pointers(seen: Seen) -> Iterator[Found]:
    directory = seen.repository.directory
    for path in seen.paths if directory is not None else ():
        if (seen.repository.sizes[path] or 0) < 1024 and _starts(Path(directory or "", path), LFS_POINTER):
            yield Found(path, "is a Git LFS pointer, not the file that it stands for")


def _starts(path: Path, start: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def mmproj_place(seen: Seen) -> Iterator[Found]:
    for model in seen.models if seen.mmprojs else ():
        if labels.llama_cpp_mmproj(seen.paths, model) is None:
            yield Found(model, "has no mmproj file in its folder or above it")


def mmproj_start(seen: Seen) -> Iterator[Found]:
    for path in seen.mmprojs:
        if not labels.file_name(path).startswith(MMPROJ):
            yield said(path, path)


def mmproj_choice(seen: Seen) -> Iterator[Found]:
    chosen = {path for model in seen.models if (path := labels.llama_cpp_mmproj(seen.paths, model)) is not None}
    if len(seen.mmprojs) > 1 and chosen:
        unused = [path for path in seen.mmprojs if path not in chosen]
        for path in unused:
            yield Found(path, "is taken for no model here")
        if len(chosen) > 1:
            yield said("mmproj", f"which one is taken depends on the model: {', '.join(sorted(chosen))}")


def no_card(seen: Seen) -> Iterator[Found]:
    if CARD not in seen.repository.sizes:
        yield absent(CARD)


def broken_front(seen: Seen) -> Iterator[Found]:
    if isinstance(seen.front, str):
        yield Found(CARD, f"has front matter that can't be read: {seen.front}")
    elif seen.card is not None and not seen.front:
        yield Found(CARD, "has no front matter")


def card_key(seen: Seen, key: str, wrong: Callable[[Seen, Any], str | None]) -> Iterator[Found]:
    if isinstance(seen.front, dict) and seen.front:
        what = wrong(seen, seen.front.get(key))
        if what is not None:
            yield Found(f"{CARD}: {key}", what)


def _one_of(*values: str) -> Callable[[Seen, Any], str | None]:
    return lambda _, value: None if value in values else f"is {value!r}, not {' or '.join(values)}"


def _base_model(_: Seen, value: Any) -> str | None:
    names = value if isinstance(value, list) else [value]
    if names and all(isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in names):
        return None
    return f"is {value!r}, not ORG/NAME" if value is not None else "is missing"


def _task(seen: Seen, value: Any) -> str | None:
    wanted = IMAGES if seen.mmprojs else TEXT
    return None if value == wanted else f"is {value!r}, not {wanted}"


def dead_links(seen: Seen) -> Iterator[Found]:
    for target in _links(seen.card or ""):
        found = HUB_FILE.match(target)
        path = target
        if found is not None and found["repo"] == seen.repository.name:
            path = found["path"]
        elif OTHER_PLACE.match(target):
            continue
        path = unquote(path.partition("#")[0].partition("?")[0]).removeprefix("./").rstrip("/")
        if path and path not in seen.repository.sizes and not any(name.startswith(path + "/") for name in seen.paths):
            yield Found(target, "leads nowhere")


def _links(card: str) -> Iterator[str]:
    for found in LINK.finditer(CODE.sub("", front_matter.split(card)[1])):
        yield found[1] or found[2]


def dead_tags(seen: Seen) -> Iterator[Found]:
    others = seen.front.get("base_model") if isinstance(seen.front, dict) else None
    for repo, tag in dict.fromkeys(TAGGED.findall(front_matter.split(seen.card or "")[1])):
        if repo == others or (seen.repository.directory is None and repo != seen.repository.name):
            continue
        missing = [
            program
            for program, found in (
                ("llama.cpp", labels.llama_cpp_file(seen.paths, tag)),
                ("Ollama", labels.ollama_candidates(seen.paths, tag)),
            )
            if not found
        ]
        if missing:
            yield Found(f"{repo}:{tag}", f"gives no file in {' and '.join(missing)}")


def no_notice(seen: Seen) -> Iterator[Found]:
    text = seen.text(NOTICE_FILE)
    if text is None:
        yield absent(NOTICE_FILE)
    elif " ".join(terms.SENTENCE.split()) not in " ".join(text.split()):
        yield Found(NOTICE_FILE, "does not say what Gemma's terms ask for")


def hub_params(seen: Seen) -> Iterator[Found]:
    text = seen.text(HUB_PARAMS)
    if text is None:
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield Found(HUB_PARAMS, f"is not JSON: {error}")
        return
    if not isinstance(values, dict):
        yield Found(HUB_PARAMS, f"is {type(values).__name__}, not an object of names and values")
        return
    for name, value in values.items():
        kinds = PARAMETERS.get(name)
        if kinds is None:
            yield Found(f"{HUB_PARAMS}: {name}", "is no parameter of Ollama")
        elif not isinstance(value, kinds) or isinstance(value, bool):
            yield Found(f"{HUB_PARAMS}: {name}", f"is {json.dumps(value)[:80]}")
        elif isinstance(value, list) and not all(isinstance(each, str) for each in value):
            yield Found(f"{HUB_PARAMS}: {name}", "has what is no text")


def hub_template(seen: Seen) -> Iterator[Found]:
    text = seen.text(HUB_TEMPLATE)
    if text is None:
        return
    if "{%" in text:
        yield Found(HUB_TEMPLATE, "is written in jinja's language, not in Go's")
        return
    depth = 0
    first, *actions = text.split("{{")
    for action, end, between in (part.partition("}}") for part in actions):
        word = (action.strip(" \t\r\n-").split() or [""])[0]
        if not end or "}}" in between:
            yield Found(HUB_TEMPLATE, "has braces without their others")
            return
        depth += (word in OPENS) - (word in CLOSES)
        if depth < 0 or (word in MIDDLE and depth == 0):
            yield Found(HUB_TEMPLATE, f"has {{{{ {word} }}}} where nothing is open")
            return
    if "}}" in first:
        yield Found(HUB_TEMPLATE, "has braces without their others")
    if depth:
        yield Found(HUB_TEMPLATE, f"lacks {depth} {{{{ end }}}}")
    if not any(name in text for name in (".Messages", ".Prompt")):
        yield Found(HUB_TEMPLATE, "uses neither .Messages nor .Prompt")


def hub_system(seen: Seen) -> Iterator[Found]:
    text = seen.text(HUB_SYSTEM)
    if text is not None and not text.strip():
        yield Found(HUB_SYSTEM, "is empty")


def checksums(seen: Seen) -> Iterator[Found]:
    text = seen.text(SUMS)
    if text is None:
        return
    try:
        sums = parse_sums(text, SUMS)
    except Gguf3nError as error:
        yield said(SUMS, error.one_line)
        return
    for path in sums:
        if path not in seen.repository.sizes:
            yield Found(f"{SUMS}: {path}", "is not there")
    for path in seen.paths:
        if path.endswith(labels.SUFFIX) and path not in sums:
            yield Found(path, f"is not in {SUMS}")
    if seen.with_data and seen.repository.directory is not None:
        for path, expected in sums.items():
            if (
                path in seen.repository.sizes
                and file_hash(seen.repository.directory / path, is_sha256=True) != expected
            ):
                yield Found(path, f"is another file than {SUMS} says")


E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTE
CARD_AGAIN = "gguf3n card DIR"
OLLAMA_AGAIN = "gguf3n ollama FILE"
RENAME = "rename it: NAME-QUANT.gguf"


def _check(id: str, severity: Severity, meaning: str, fix: str, find: Find) -> Check[Seen]:
    return Check(id, severity, meaning, fix, Group.REPOSITORY, find)


# fmt: off
REPOSITORY_CHECKS: tuple[Check[Seen], ...] = (
    _check("lfs-pointer", E, "no program can read it",
           "git lfs pull; in GitHub Actions, actions/checkout with lfs: true", lfs_pointers),
    _check("no-model", E, "llama.cpp and Ollama find nothing to load",
           "name the folder with the GGUF files", no_model),
    _check("hidden-model", E, "llama.cpp takes it for no model, and so does `-hf`",
           RENAME, hidden_models),
    _check("no-label", W, "the Hub shows no quantization, and Ollama finds it by its whole name only",
           f"{RENAME}, with a QUANT that the Hub knows", no_label),
    _check("same-label", W, "which of them Ollama gets, the Hub does not say; llama.cpp takes the first in the listing",
           "give each a repository of its own, or tell its whole name as the tag", same_label),
    _check("other-file", W, "who asks for one quantization gets another",
           "name the file in the card: llama-server -hf ORG/REPO -hff FILE", other_file),
    _check("unreachable", W, "llama.cpp wants the quantization and then . or - in a name",
           RENAME, unreachable),
    _check("borrowed-tag", N, "llama.cpp takes a tag wherever it stands in a name",
           "write the whole tag in the card", borrowed_tag),
    _check("no-default", W, "Ollama takes what the Hub chooses",
           "add a Q4_K_M, or write a tag into every command of the card", no_default),
    _check("split-model", W, "the Hub refuses it for `ollama run hf.co/…`",
           "llama-gguf-split --merge FIRST OUT", split_models),
    _check("missing-part", E, "no program loads the model",
           "upload all parts", missing_parts),
    _check("preset-ini", W, "llama.cpp loads what it says, whatever the tag",
           "remove it, unless that is meant", preset),
    _check("mmproj-place", E, "llama.cpp shows the model no images",
           "put the mmproj file into the model's folder, or above it", mmproj_place),
    _check("mmproj-start", W, "LM Studio does not find it",
           "name it mmproj-NAME-TYPE.gguf", mmproj_start),
    _check("mmproj-choice", W, "llama.cpp takes the one whose number of bits is nearest to the model's",
           "publish one, as mmproj-NAME-F16.gguf", mmproj_choice),
    _check("no-card", W, "the Hub shows no license, and people no reason to choose it",
           CARD_AGAIN, no_card),
    _check("front-matter", E, "the Hub shows no license, no original and no task",
           CARD_AGAIN, broken_front),
    _check("card-license", W, "Gemma's license goes with all that is made of it",
           "license: gemma", partial(card_key, key="license", wrong=_one_of(terms.LICENSE))),
    _check("card-base-model", W, "the Hub does not show the repository at its original",
           "base_model: ORG/NAME", partial(card_key, key="base_model", wrong=_base_model)),
    _check("card-relation", W, "the Hub guesses what was done with the original",
           "base_model_relation: quantized", partial(card_key, key="base_model_relation", wrong=_one_of("quantized"))),
    _check("card-library", N, "the Hub guesses it",
           "library_name: gguf", partial(card_key, key="library_name", wrong=_one_of("gguf"))),
    _check("card-task", W, "people who search for the task do not find it",
           CARD_AGAIN, partial(card_key, key="pipeline_tag", wrong=_task)),
    _check("dead-link", W, "a reader finds nothing",
           "correct the card", dead_links),
    _check("dead-tag", E, "a command of the card fails",
           f"correct the card, or {CARD_AGAIN}", dead_tags),
    _check("no-notice", W, "Gemma's terms ask for it in what is passed on",
           CARD_AGAIN, no_notice),
    _check("hub-params", E, "Ollama refuses it, or leaves it out",
           OLLAMA_AGAIN, hub_params),
    _check("hub-template", E, "Ollama refuses it",
           OLLAMA_AGAIN, hub_template),
    _check("hub-system", W, "the model is told nothing",
           "remove it, or write a system message", hub_system),
    _check("checksums", W, "who checks a download is told that it is broken",
           CARD_AGAIN, checksums),
)
# fmt: on


@dataclass(frozen=True)
class Tag:
    """What a tag gives; None is no tag.

    Args:
        llama_cpp: the file that it loads.
        mmproj: the one that it takes beside that.
        ollama: the files of which the Hub gives it one.
    """

    tag: str | None
    llama_cpp: str | None
    mmproj: str | None
    ollama: tuple[str, ...]


@dataclass(frozen=True)
class RepositoryReport(Report):
    """What lint says of a repository, and which file each tag gives."""

    tags: tuple[Tag, ...] = ()


def lint_repository(source: str | Path | Repository, *, with_data: bool = False) -> RepositoryReport:
    """Check a repository as the programs that fetch from it will see it.

    Args:
        source: a directory, ORG/REPO on the Hub, or what `open_repository` returned.
        with_data: hold the files of a directory against their checksums too.

    Raises: UsageError for what can't be listed; HubError.
    """
    repository = source if isinstance(source, Repository) else open_repository(source)
    seen = Seen(repository, with_data=with_data)
    findings = [found for check in REPOSITORY_CHECKS for found in islice(check.findings(seen), MAX_FINDINGS)]
    return RepositoryReport(
        repository.name, tuple(findings), len(REPOSITORY_CHECKS), tags=tuple(_tag(seen, tag) for tag in _tags(seen))
    )


def _tags(seen: Seen) -> Iterator[str | None]:
    if seen.models:
        yield None
    yield from sorted(seen.by_label)


def _tag(seen: Seen, tag: str | None) -> Tag:
    model = labels.llama_cpp_file(seen.paths, tag)
    mmproj = None if model is None else labels.llama_cpp_mmproj(seen.paths, model)
    return Tag(tag, model, mmproj, tuple(labels.ollama_candidates(seen.paths, tag)))
