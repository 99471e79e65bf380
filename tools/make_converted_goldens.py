"""Makes golden_llama/converted.json and golden/converted.json in tests: what llama.cpp's converter writes.

    python -m pip install -r tools/requirements-goldens.txt sentencepiece tiktoken
    python tools/make_converted_goldens.py LLAMA_CPP_FOLDER

Of each checkpoint of tests/llama_checkpoints.py and tests/deepseek_checkpoints.py and each type the files have all
keys, and of each tensor its type, shape and SHA-256. llama.cpp knows the pre-tokenizers of published models by a hash,
which no small vocabulary has: here it is told "gpt-2", or "kimi-k2". Of DeepSeek's kind it reads no SentencePiece: here
it takes Llama's way. `--tokenizer` makes the SentencePiece model anew that these checkpoints have, from the README.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden_llama"
sys.path.insert(0, str(ROOT / "tests"))

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def make_tokenizer():
    """tokenizer.model, and tokenizer.json as transformers converts it."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            input=str(ROOT / "README.md"), model_prefix=f"{folder}/tokenizer", vocab_size=380, model_type="bpe",
            byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity", num_threads=1,
            user_defined_symbols=["<sep>"], control_symbols=["<ctl>"], minloglevel=2,
        )  # fmt: skip
        (GOLDEN / "tokenizer.model").write_bytes(Path(folder, "tokenizer.model").read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
    vocab = {pieces.IdToPiece(i): i for i in range(pieces.vocab_size())}
    merges = generate_merges(vocab, {text: pieces.GetScore(i) for text, i in vocab.items()})
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    document = json.loads(tokenizer.to_str())
    start = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    document["post_processor"] = {
        "type": "TemplateProcessing", "single": [*start, a], "pair": [*start, a, *start, b],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    (GOLDEN / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


def converted(folder, out, kind):
    """Run llama.cpp's converter -> keys, tensors."""
    import gguf
    from conversion import ModelBase, get_model_class  # of llama.cpp

    hparams = ModelBase.load_hparams(folder, False)
    model_class = get_model_class(hparams["architectures"][0])
    is_kimi = (folder / "tiktoken.model").exists()
    model_class.get_vocab_base_pre = lambda self, tokenizer: "kimi-k2" if is_kimi else "gpt-2"
    model_class.no_mtp = True
    if (folder / "tokenizer.model").exists() and model_class.__name__ == "DeepseekV2Model":
        model_class = type(
            "WithSentencePiece",
            (model_class,),
            {"set_vocab": model_class._set_vocab_sentencepiece, "model_arch": model_class.model_arch},
        )
    model_class(folder, gguf.LlamaFileType[TYPES[kind]], out, use_temp_file=False, eager=True).write()
    reader = gguf.GGUFReader(out)
    keys = {key: plain(field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {
        tensor.name: [
            tensor.tensor_type.name,
            [int(n) for n in reversed(tensor.shape)],
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        ]
        for tensor in reader.tensors
    }
    return keys, tensors


def plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_cpp", type=Path, help="a folder of llama.cpp's sources")
    parser.add_argument("--tokenizer", action="store_true", help="make the SentencePiece model anew")
    args = parser.parse_args()
    if args.tokenizer:
        make_tokenizer()
    sys.path[:0] = [str(args.llama_cpp / "gguf-py"), str(args.llama_cpp)]
    from deepseek_checkpoints import CHECKPOINTS as DEEPSEEK
    from deepseek_checkpoints import described
    from llama_checkpoints import CHECKPOINTS, write_llama_checkpoint

    goldens, deepseek = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out.gguf")
        for name in CHECKPOINTS:
            folder = write_llama_checkpoint(Path(scratch, name), name)
            goldens[name] = {}
            for kind in TYPES:
                keys, tensors = converted(folder, out, kind)
                goldens[name].setdefault("keys", keys)
                goldens[name][kind] = {"file_type": keys["general.file_type"], "tensors": tensors}
        for name, write in DEEPSEEK.items():
            write(Path(scratch, name))
            for kind in ("bf16", "q8_0"):
                converted(Path(scratch, name), out, kind)
                deepseek[f"{name} {kind}"] = described(out)
    for path, document in ((GOLDEN, goldens), (ROOT / "tests" / "golden", deepseek)):
        text = json.dumps(document, ensure_ascii=False, indent=0)
        (path / "converted.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
