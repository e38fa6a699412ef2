"""What comes from outside, before a person, a log or a page has it.

masked      without passwords, tokens, keys and signatures: every error, notice, name of a server and page
printable   one line in characters that do nothing to a terminal
inert       a whole line of output that no CI system takes for a command
"""

from __future__ import annotations

import os
import re
import unicodedata

MASK = "***"

SECRET_VARIABLES = ("LLAMA_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables whose values are masked wherever they stand: servers repeat what they were sent."""
MIN_SECRET_CHARS = 6
"""Why: masking a shorter value would take ordinary words apart, and give the value away by doing so."""

HARMLESS_PARAMETERS = frozenset({"download", "raw", "ref", "revision"})
"""What is shown of an address's query. Why: signatures have a name of their own at every provider."""

_STORE = r"x-(?:amz|goog|ms|oss|cos)-[\w-]{1,40}"
_NAMES = (
    r"(?:access|auth|refresh|id|hf|api|security|session)[-_]?token|token|(?:client[-_]?)?secret|password|passwd|pwd"
    rf"|(?:llama[-_])?api[-_]?key|(?:aws)?access[-_]?key(?:[-_]?id)?|signature|sig|jwt|credential|{_STORE}"
)

SECRETS: tuple[tuple[str, str], ...] = (
    # user:password@host, of an address; then where the password has a slash; then without a scheme
    (r"(://)[^/?#\s@]{0,500}(?:@[^/?#\s@]{0,500}){0,8}@", rf"\1{MASK}@"),
    (r"(://)[^\s/@:]{1,200}:(?!\d{1,5}(?:[/?#\s]|$))[^\s@]{0,500}@", rf"\1{MASK}@"),
    (r"(?<![\w.%+/-])[\w.%+-]{1,64}:[^\s@/]{1,200}@(?=[\w.-])", f"{MASK}@"),
    (r"""(?i)\b(authorization\\?["']?\s{0,4}[:=]\s{0,4}\\?["']?)(?:\w{1,20}[ \t]+)?[^\s"',;\\]+""",
     rf"\1{MASK}"),
    (r"""(?i)\b(bearer\s{1,4}["']?)[^\s"',;<>\\]{6,}""", rf"\1{MASK}"),
    # name=value, and "name": "value" of JSON
    (rf"""(?i)(?<![\w-])((?:{_NAMES})(?:\s{{0,4}}=|\\?["']\s{{0,4}}:)\s{{0,4}}\\?["']?)[^\s&"',;}}\\]+""",
     rf"\1{MASK}"),
    (r"(?i)(?<![\w-])((?:x-)?(?:api[-_ ]?key|password)\s{0,4}:\s{0,4})[^\s\"',;}]+", rf"\1{MASK}"),
    # tokens by their own look: the Hub's, OpenAI's, GitHub's, GitLab's, Amazon's, JSON Web Tokens
    (r"\b(hf_(?!(?:transfer|metadata)\b)|api_org_)[A-Za-z0-9]{6,}", rf"\1{MASK}"),
    (r"\b(sk-|gh[pousr]_|github_pat_|glpat-)[\w-]{16,}", rf"\1{MASK}"),
    (r"\bA[KS]IA[A-Z0-9]{12,}", MASK),
    (r"\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?", MASK),
)  # fmt: skip
"""What a secret looks like, and what is left of it; lengths are bounded, so that no text takes long.

Why strings: most runs mask nothing, and need not wait for them to be compiled.
"""

_QUERY = re.compile(r"""(?i)\b([a-z][a-z0-9+.-]{1,20}://[^\s?#"'<>]{1,4000})([?#][^\s"'<>]*)""")
_PARAMETER = re.compile(r"([?&;#])([^=&;#]*)(=?)([^&;#]*)")

NOT_PRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: controls and escapes, changes of direction and what is invisible, halves, ends of lines."""

_GITHUB = re.compile(r"^(\s*):(?=:)")
_ANYWHERE = re.compile(r"##(?=(?:vso|teamcity)?\[)")


def masked(text: str) -> str:
    """The text without the secrets that addresses, headers and answers of servers carry."""
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, MASK)
    text = _QUERY.sub(lambda found: found[1] + _PARAMETER.sub(_masked_parameter, found[2]), text)
    for pattern, left in SECRETS:
        text = re.sub(pattern, left, text)
    return text


def _masked_parameter(found: re.Match[str]) -> str:
    mark, name, equals, value = found.groups()
    if equals:
        return f"{mark}{name}={value if name.lower() in HARMLESS_PARAMETERS else MASK}"
    return f"{mark}{MASK if name else ''}"


def printable(text: str) -> str:
    """One line, without characters that could steer a terminal or change what stands around them."""
    return "".join("�" if unicodedata.category(c) in NOT_PRINTABLE else c for c in text)


def one_line(text: str) -> str:
    """The same of a text of several lines, which are joined."""
    return printable(" ".join(text.splitlines()))


def inert(line: str) -> str:
    """A line that is not a command to what reads a log.

    Source: `::command::` at a line's beginning, spaces aside, and `##[command]` anywhere are GitHub's runner's
    (ActionCommand.cs); `##vso[` is Azure Pipelines', `##teamcity[` TeamCity's.
    """
    return _ANYWHERE.sub("# #", _GITHUB.sub(r"\1: ", line))


def inert_json(text: str) -> str:
    """The same of JSON in ASCII, which means the same to a parser; none of its lines begins with a colon."""
    return _ANYWHERE.sub(r"\\u0023#", text)
