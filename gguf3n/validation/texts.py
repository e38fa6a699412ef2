"""What is read to validate a file: a text in many scripts, hard cases for a tokenizer, chats.

The text is for perplexity, so its paragraphs are coherent, mostly English; after every few of them comes one in another
language, so that the beginning is like the whole. The cases are all that a tokenizer may stumble over.
"""

# ruff: noqa: RUF001 (letters that look like others are what these texts are about)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from gguf3n.engines.reference_tokenizers import Tokenizer
from gguf3n.engines.template_process import Chat


@dataclass(frozen=True)
class Case:
    """A short text. The tokenizers in `unlike` cut it in another way than llama.cpp, whatever the file."""

    name: str
    text: str
    unlike: frozenset[Tokenizer] = frozenset()


def built_in_text() -> str:
    """The text: prose in 20 languages, code, a table, formulas; some 22,500 characters, half of them English prose."""
    return (resources.files(__package__) / "built_in_text.txt").read_text(encoding="utf-8")


LONGEST_RUN = 31
"""Of spaces and of newlines that are one token of Gemma's vocabulary."""

LONGER = frozenset({Tokenizer.TRANSFORMERS})
"""Why: of more spaces than one token has, tokenizers merges pairs, then pairs of pairs: two tokens of 16 for 32 spaces.
sentencepiece and llama.cpp take 31 first, and the space that is left over begins the next word. They are user-defined
tokens, which tokenizers looks for before spaces have become "▁"; newlines it finds like the others."""

LITERAL = frozenset({Tokenizer.TRANSFORMERS, Tokenizer.SENTENCEPIECE})
"""Why: a "▁" in the text is a space to all three, but runs of spaces are written with spaces in a GGUF file and found
before spaces become "▁", so llama.cpp knows no run with a literal "▁" in it."""

CASES: tuple[Case, ...] = (
    Case("empty", ""),
    Case("space", " "),
    Case("leading space", " word"),
    Case("trailing space", "word "),
    Case("spaces around", "  two words  "),
    *(
        Case(f"spaces {n}", f"a{' ' * n}b", LONGER if n > LONGEST_RUN else frozenset())
        for n in (*range(2, 12), 15, 16, 17, 30, 31, 32, 33, 40, 62, 64)
    ),
    *(Case(f"newlines {n}", "a" + "\n" * n + "b") for n in (*range(1, 12), 15, 16, 17, 30, 31, 32, 33, 40, 62, 64)),
    *(Case(f"tabs {n}", "a" + "\t" * n + "b") for n in (1, 2, 3, 4, 8, 31, 32)),
    Case("indented code", "def f(x):\n    if x:\n\t\treturn [\n            x,\n        ]\n"),
    Case("mixed blanks", "a \t b\n \n\t\n  \n\nc\v\fd"),
    Case("CRLF", "one\r\ntwo\r\n\r\nthree\rfour"),
    Case("other blanks", "a\u00a0b\u2002c\u2009d\u200ae\u202ff\u205fg\u3000h\u1680i\u2028j\u2029k\u0085l"),
    Case("invisible", "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg\u200eh\u200fi\u202aj\u202ck\u2066l\u2069m"),
    Case("byte order mark", "\ufeffAt the beginning."),
    Case("turn", "<start_of_turn>user\nWhat is this?<end_of_turn>\n<start_of_turn>model\n"),
    Case("turn marks only", "<start_of_turn><end_of_turn><end_of_turn><start_of_turn>"),
    Case("turn marks in words", "a<start_of_turn>b<end_of_turn> c <start_of_turn> d"),
    Case("no turn marks", "<start_of_turn <end_of_turn] start_of_turn> <START_OF_TURN> < end_of_turn >"),
    Case("control tokens", "a<pad>b<eos>c<bos>d<unk>e<mask>f"),
    Case("begin token first", "<bos>Once"),
    Case("unused tokens", "<unused0><unused1> <unused10>\n<unused98><unused99>"),
    Case("multimodal", "[multimodal] and multimodal"),
    Case("image and sound", "<start_of_image><start_of_audio> then text"),
    Case("tags", "<table><thead><tr><th>a</th></tr></thead></table> <b>bold</b><i>x</i><u>y</u><s>z</s>"),
    Case("more tags", "<h1>One</h1><blockquote>two</blockquote><code>x</code><ul><li>1</li></ul><a>b</a><img>"),
    Case("HTML", '<!DOCTYPE html>\n<p class="x">1 &lt; 2 &amp; 3</p><br/>\n<div><span id=\'y\'>z</span></div>'),
    Case("byte tokens as text", "<0x0A><0xFF><0x00> 0x0A"),
    Case("literal mark", "a\u2581b"),
    Case("literal mark first", "\u2581word"),
    Case("literal marks", "a\u2581\u2581b", LITERAL),
    Case("literal mark and spaces", "a \u2581 b", LITERAL),
    Case("control characters", "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0)))),
    Case("zero bytes", "a\0b\0\0c"),
    Case("ASCII", "".join(map(chr, range(33, 127)))),
    Case("Latin 1", "".join(map(chr, range(0xA1, 0x100)))),
    Case("digits", "0 1 12 123 1234 12345 1234567890 007 3.14159 1,000,000 -273.15 6.02e23 1/2 50% 0b1010 0xDEADBEEF"),
    Case("digits of other scripts", "٣٤٥ ४५ ๔๕ １１ ④ Ⅻ ½ 三十"),
    Case("dates", "2024-02-29T23:59:60Z, 29/02/2024, 11:59 p.m., 5'11\", $9.99, €1.234,56, £12, ¥300, +49 (0)30 123"),
    Case("URL", "https://user:pass@example.org:8443/a_b/c-d/%7Ee?q=1&r=%E2%9C%93#top mailto:x.y+z@mail.example"),
    Case("path", "C:\\Users\\me\\file (1).txt /usr/lib/x86_64-linux-gnu/libm.so.6 ~/.config/../a"),
    Case("punctuation", "Wait... what?! (No; yes: “maybe” — ‘perhaps’ – «non»)… *** --- ___ ::: ~~~"),
    Case("mathematics", "∀x∈ℝ: x² ≥ 0 ∧ √2 ≈ 1.414 ⇒ ∑ᵢ aᵢ ≠ ∫∂f/∂x ± ∞ ⊆ ∅"),
    Case("TeX", r"\frac{a}{b}\,\sum_{i=1}^{n}\left(x_i-\bar{x}\right)^2 \quad \mathbb{R}^{n\times m} $$ \% \\"),
    Case("styled letters", "𝐀𝐁 𝕒 Ⓐ ＡＢ ℂ ﬁﬂ ªº ™ © ℻"),
    Case("JSON", '{"a": [1, 2.5, -3e-4, null, true], "b\\n": {"c": "\\u00e9\\\\"}}'),
    Case("Python", 'x = {k: v for k, v in zip("ab", (1, 2))}  # é\nprint(f"{x!r:>{10}}", end="")\n'),
    Case("C", '#define F(x) ((x) << 2 | 0x1FUL)\nint main(void) { printf("%5.2f\\n", *p++->y); /* z */ return 0; }'),
    Case("shell", "for f in *.gguf; do sha256sum \"$f\" | awk '{print $1}' >> sums.txt 2>&1; done && echo \"ok: $?\""),
    Case("table", "| a | b |\n|---|:-:|\n| 1 |   |\n|   | 2 |\n"),
    Case("list", "1. one\n2. two\n   - a\n   - b\n      * c\n10. ten\n"),
    Case("composed", "café naïve Ångström ấ ǖ 각 が"),
    Case("decomposed", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m a\u0302\u0301 \u1100\u1161\u11a8 \u304b\u3099"),
    Case("stacked marks", "z\u0351\u036b\u0343\u036a\u0302\u036b\u0321a\u0337\u0321\u0333l\u0334\u0321g\u0335o\u0336"),
    Case("lone marks", "\u0301\u0302\u0303 \u20dd \ufe0f\u200d"),
    Case("emoji", "😀😂❤\ufe0f✅⭐🚀🎉 ☺ ☺\ufe0e ☺\ufe0f #\ufe0f\u20e3 1\ufe0f\u20e3"),
    Case("emoji joined", "👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🧑🏽\u200d🚀 ❤\ufe0f\u200d🔥"),
    Case("emoji skin tones", "👍👍🏻👍🏼👍🏽👍🏾👍🏿 🏽"),
    Case("flags", "🇩🇪🇫🇷🇯🇵 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f 🇽"),
    Case("private use", "\ue000\uf8ff \U000f0000\U0010fffd"),
    Case("not characters", "\ufffe\uffff \ufdd0 \U0001ffff \U0010ffff"),
    Case("unassigned", "\u0378\u05ff \U0003fffd \U000e0fff"),
    Case("replacement character", "a\ufffdb\ufffd\ufffd"),
    Case("rare letters", "ᚁᚏᚠᚱ 𐌰𐌱 𒀀𒊫 𓀀𓂀 ᬅᬓ ꓐꔀ"),
    Case("rare characters", "\u9f98\U0002070e\U00031350\U0002ebe0 \u3400\u4db5 \ufa0e \u2e80\u2fd5 \u31c0"),
    Case("long word", "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4),
    Case("long repetition", "ab" * 700),
    Case("one letter", "a" * 1000),
    Case("mixed scripts", "p\u0430ssw\u043erd \u0391lpha βeta 中文and日本語한국어ไทย"),
    Case("both directions", "abc אבג 123 العربية (x) \u202e321\u202c"),
    Case("upper case", "TODO: DON'T SHOUT! McDonald's iPhone eBay XMLHttpRequest snake_case kebab-case"),
    Case("Armenian", "Բարև Ձեզ, ինչպե՞ս եք:"),
    Case("Georgian", "გამარჯობა, როგორ ხარ?"),
    Case("Amharic", "ሰላም ነው፤ ደህና ነህ?"),
    Case("Persian", "سلام، می\u200cخواهم ۱۲ کتاب بخرم."),
    Case("Urdu", "آپ کیسے ہیں؟ میں ٹھیک ہوں۔"),
    Case("Telugu", "నమస్కారం, మీరు ఎలా ఉన్నారు?"),
    Case("Sinhala", "ආයුබෝවන්, ඔබට කොහොමද?"),
    Case("Khmer", "សួស្តី តើអ្នកសុខសប្បាយទេ?"),
    Case("Burmese", "မင်္ဂလာပါ။ နေကောင်းလား။"),
    Case("Tibetan", "བཀྲ་ཤིས་བདེ་ལེགས།"),
    Case("Cherokee", "ᎣᏏᏲ ᏙᎯᏩ"),
)  # fmt: skip
"""All tokenizers cut these the same way, except those named in `unlike`, unless the file is faulty."""


CHATS: Mapping[str, Chat] = {
    "chat": (
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?\n\nThink of a child of six.  "},
        {"role": "assistant", "content": "Blue light bounces about in the air more than red light 🌈."},
        {"role": "user", "content": "  And at sunset?"},
    ),
    "chat without a system message": (
        {"role": "user", "content": "Übersetze ins Französische:\n```\nprint('Guten Tag')\n```"},
    ),
    "chat of lists": (
        {"role": "system", "content": [{"type": "text", "text": "  Be brief. "}]},
        {"role": "user", "content": [{"type": "text", "text": " What is 2 + 2? "}, {"type": "text", "text": "And 3?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "4 and 3."}]},
        {"role": "user", "content": [{"type": "text", "text": "Thanks!\n"}]},
    ),
    "chat of a list without a system message": (
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two "}]},
    ),
}  # fmt: skip
"""Chats to be rendered; the model is to speak next."""
