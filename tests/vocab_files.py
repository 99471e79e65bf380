"""Vocabulary-only GGUF files for the tokenizer tests, llama.cpp's view of them, and texts that are hard to cut up."""

import ctypes
import os
import random
from contextlib import contextmanager
from pathlib import Path

import gguf
import platformdirs
import pytest
from hypothesis import strategies as st

# GPT-2's alphabet: printable bytes stand for themselves, the others for 256 and up, in their order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHARACTER_OF_BYTE = {byte: chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte)) for byte in range(256)}

VOCABS = Path(os.environ.get("EDGE_MOE_VOCABS") or Path(platformdirs.user_cache_dir("edge-moe"), "vocabs"))

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    " \n",
    "\n\n\n",
    "\r\n \r\n",
    "\t\t \t",
    "a",
    " a",
    "a ",
    "  a  b   c    ",
    "Hello, world!",
    "In the beginning God created the heaven and the earth.",
    "I'm sure they're here; we'll see, don't you've it? He'd said it's 'quoted'. CAN'T WON'T I'LL",
    "camelCase HTTPServer snake_case SCREAMING_CASE kebab-case x2y3",
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 0xDEADBEEF ٣٤٥ ²³½ Ⅷ",
    'def f(x):\n    """Doc."""\n    if x != 0 and x**2 >= 4:\n\t\treturn {"a": [1, 2], \'b\': None}\n\n\n# end\n',
    "for (int i = 0; i < n; ++i) { a[i] ^= b[i] << 3; } // *&%$#@! ~`|\\",
    '<p class="x">&nbsp;</p> https://example.org/a?b=c&d=%20#e user@host [link](u) | a | b |',
    "Der Fuß des Bären; où est l'œuvre? Mañana será ÀÉÎÕÜ ſtraße Straſse",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ѢѣҐґ",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία ᾳῃῳ Ω Ω K Å",
    "敏捷的棕色狐狸跳過懶狗。你好，世界！１２３《書》「引」",
    "いろはにほへと チリヌルヲ ｶﾀｶﾅ 漢字かな交じり文、です。",
    "다람쥐 헌 쳇바퀴에 타고파 ㄱㄴㄷ ㅏㅑ 각",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण १२३",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣ الْعَرَبِيَّة",
    "דג סקרן שט בים מאוכזב שָׁלוֹם",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "தமிழ் বাংলা ქართული հայերեն አማርኛ ᠮᠣᠩᠭᠣᠯ ភាសាខ្មែរ བོད་ཡིག",
    "e\u0301 n\u0303 o\u0308\u0304 Z\u0351\u036b\u0343\u036a\u0302 \u0301alone",
    "😀👍🏽👨‍👩‍👧‍👦🏳️‍🌈🇩🇪🇫🇷 ❤️ ☺ ♠♥ → ⇒ ∑∫√∞ ≠≤≥ €£¥₿ ©®™ …—–‘’“”",
    "\u00a0\u1680\u2000\u2003\u2009\u2028\u2029\u202f\u205f\u3000\u0085 \u200b\u200d\ufeff\u2060",
    "a\u00a0b\u2003c\u3000d\u3000\u3000e \u3000 f\u2028g\u0085h\u000bi\u000cj",
    "你\u3000好\u3000\u3000。 \u3000、\u2003漢\u2009\n",
    "\x00\x01\x02\x1b[0m\x1c\x1d\x1e\x1f\x7f\x80\x9f",
    "\ufffd\ufffe\uffff\ue000\U000f0000 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𠀀𠮷 𐐀𐐨 𞤀𞤢",
    "豈更車 〇 々 〆 ゟ ヿ ㈱ ㍿ ﬁ ﬀ ﷽",
    "'ſ 'S 'Re 'LL ''s '' ' s",
    "zqzqz zqzqzq Zqzqz",
    "</s><s><unk><|im_start|>user\n<|im_end|><|eot_id|><|endoftext|><0x0A><pad>",
    "[TOOL][TOOLS][TOOL ] <|im_end|><|im_end |> ▁▁a▁ b",
    "a" * 300 + " " * 70 + "b" * 5 + "\n" * 40 + "=" * 90,
)

_PIECES = (
    *("'s", "'T", "'re", " 'll", "  ", "\n", "\r\n", "\n\n", " \n", "\t", "1234567", "12", "Hello", " world", "the"),
    *(
        "\u3000",
        "\u2003",
        "\u0085",
        "\x1c",
        "漢字",
        "ひら",
        "カタ",
        "한국",
        "你好，",
        "😀",
        "👨\u200d👩",
        "e\u0301",
        "न",
    ),
    *("م", "ſ", "İ", "—…", "==", "//", "</s>", "<|im_end|>", "[TOOL]", "zqzqz", "▁", "\x00", "\ufffd", "Ⅷ", "²"),
)
# Blocks in which the Unicode versions of Python, the regex engine and llama.cpp agree.
_BLOCKS = ((0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F))
_BLOCKS += ((0x2000, 0x206F), (0x20A0, 0x20BF), (0x2190, 0x21FF), (0x3000, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3))
_BLOCKS += ((0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x1F300, 0x1F64F), (0x20000, 0x2A6D0), (0x300, 0x36F), (0x0, 0x1F))


def texts():
    """Texts of words, white space and characters of many scripts."""
    characters = st.one_of([st.characters(min_codepoint=low, max_codepoint=high) for low, high in _BLOCKS])
    pieces = st.one_of(st.sampled_from(_PIECES), st.text(characters, min_size=1, max_size=4))
    return st.lists(pieces, max_size=24).map("".join)


def real_vocabulary(name):
    """The path of one of llama.cpp's vocabularies; skips if they have not been fetched."""
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("no real vocabularies on this machine; python tools/fetch_vocabs.py fetches them")
    return path


def write_vocabulary(path, tokenizer):
    """Write a GGUF that holds `tokenizer` (metadata by their full keys) and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in tokenizer.items():
        name = key.removeprefix("tokenizer.ggml.")
        if name == "tokens":
            writer.add_token_list(list(value))
        elif name == "merges":
            writer.add_token_merges(list(value))
        elif name == "scores":
            writer.add_token_scores([float(score) for score in value])
        elif name == "token_type":
            writer.add_token_types([int(kind) for kind in value])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def with_extra_tokens(tokenizer):
    """A copy with tokens of every kind added: control, user-defined, unused, and a word that no merge makes."""
    extra = {
        "<|im_start|>": 3,
        "<|im_end|>": 3,
        "TOOL]": 4,
        "[TOOL]": 4,
        "[TOOLS]": 4,
        "        ": 4,
        "zqzqz": 1,
        "<gone>": 5,
    }
    extra = {text: kind for text, kind in extra.items() if text not in set(tokenizer["tokenizer.ggml.tokens"])}
    return {
        **tokenizer,
        "tokenizer.ggml.tokens": [*tokenizer["tokenizer.ggml.tokens"], *extra],
        "tokenizer.ggml.token_type": [*map(int, tokenizer["tokenizer.ggml.token_type"]), *extra.values()],
    }


def boundary_vocabulary(pre):
    """A vocabulary that shows where a text was cut: its only merges join the last byte of a character to the next."""
    ascii_ = [ord(c) for c in " \n\r\t\x0b\x1c\x00asTl12.',-/=_$"]
    lefts, rights = [*ascii_, *range(0x80, 0xC0)], [*ascii_, *range(0xC2, 0xF5)]
    letters = [CHARACTER_OF_BYTE[byte] for byte in range(256)]
    merges = [f"{letters[left]} {letters[right]}" for left in lefts for right in rights]
    random.Random(0).shuffle(merges)
    tokens = letters + [merge.replace(" ", "") for merge in merges] + ["<eos>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


def sentencepiece_vocabulary(seed, *, across_spaces=False, with_bytes=True, add_space_prefix=True):
    """A SentencePiece vocabulary of random pieces over a small alphabet, many of them with equal scores."""
    rng = random.Random(seed)
    alphabet = "abcd▁é漢"
    pieces = set(alphabet)
    while len(pieces) < 150:
        piece = "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 5)))
        if across_spaces or "▁" not in piece.lstrip("▁"):
            pieces.add(piece)
    tokens = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
    if with_bytes:
        tokens += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    tokens += [(piece, 1, -float(rng.randint(1, 12))) for piece in sorted(pieces)]
    tokens += [("[TOOL]", 4, 0.0), ("<pad>", 3, 0.0)]
    texts_, kinds, scores = zip(*tokens, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(texts_),
        "tokenizer.ggml.token_type": list(kinds),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


class LlamaCppTokenizer:
    """What llama.cpp makes of a vocabulary."""

    def __init__(self, llama_cpp, path):
        self._c = llama_cpp
        self._model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model.model)

    def encode(self, text, *, parse_special, add_special=False):
        return self._model.tokenize(text.encode(), add_bos=add_special, special=parse_special)

    def piece(self, token_id):
        buffer = ctypes.create_string_buffer(4096)
        size = self._c.llama_token_to_piece(self._vocab, token_id, buffer, len(buffer), 0, True)
        assert size >= 0
        return buffer.raw[:size]

    @property
    def eos_ids(self):
        return {i for i in range(self._model.n_vocab()) if self._c.llama_vocab_is_eog(self._vocab, i)}

    @property
    def adds(self):
        return self._c.llama_vocab_get_add_bos(self._vocab), self._c.llama_vocab_get_add_eos(self._vocab)

    def close(self):
        self._model.close()


@contextmanager
def llama_cpp_tokenizer(path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the reference; install the test extra")
    tokenizer = LlamaCppTokenizer(llama_cpp, path)
    try:
        yield tokenizer
    finally:
        tokenizer.close()
