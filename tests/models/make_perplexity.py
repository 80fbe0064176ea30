"""Records what llama.cpp says of tests/models/data/alice.txt: python -m tests.models.make_perplexity

Needs llama-cpp-python (0.3.36 made the recorded figures) and the SmolLM2 package. The windows are those of llama.cpp's
`tools/perplexity/perplexity.cpp`, which the Python package does not carry: for each window the cache is cleared, all
its tokens are evaluated, and the losses behind the window's half (or of the last `stride` tokens) are summed, of logits
in double precision. llama.cpp rounds activations to 8 bits before it multiplies them with weights in blocks, and keys
and values to f16; "f32" is the same model widened, with a cache in f32, where it rounds neither. The text is the
beginning of Lewis Carroll's "Alice's Adventures in Wonderland" (1865), which is in the public domain.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"


def measure(llama: Any, tokens: list[int], context: int, stride: int) -> float:
    step = stride or context
    last = len(tokens) - context if not stride else len(tokens) - context - 1
    first = context // 2 if not stride else context - stride - 1
    total, count = 0.0, 0
    for start in range(0, last + 1, step):
        window = tokens[start : start + context]
        llama.reset()
        llama.eval(window)
        logits = np.asarray(llama.scores[:context], np.float64)
        for i in range(first, context - 1):
            highest = logits[i].max()
            total += highest + np.log(np.exp(logits[i] - highest).sum()) - logits[i, window[i + 1]]
            count += 1
    return float(np.exp(total / count))


def widened(path: Path, target: Path) -> Path:
    """The same model with all its weights in f32."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        wide = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        writer.add_tensor(tensor.name, wide.reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def main() -> None:
    from llama_cpp import Llama

    from sapper.models.locate import find_model

    text = (DATA / "alice.txt").read_text(encoding="utf-8")
    recorded: dict[str, Any] = {"llama_cpp_python": "0.3.36"}
    with tempfile.TemporaryDirectory() as directory:
        packed = find_model("smollm2")
        for form, path in (("file", packed), ("f32", widened(packed, Path(directory) / "f32.gguf"))):
            exact = {} if form == "file" else {"type_k": 0, "type_v": 0}  # ggml's number for f32
            llama = Llama(str(path), n_ctx=512, logits_all=True, verbose=False, **exact)
            tokens = llama.tokenize(text.encode(), add_bos=True, special=False)
            recorded["tokens"] = len(tokens)
            recorded[form] = [
                {"context": context, "stride": stride, "perplexity": round(measure(llama, tokens, context, stride), 5)}
                for context, stride in ((512, 0), (128, 0), (256, 64))
            ]
    (DATA / "perplexity.json").write_text(json.dumps(recorded, indent=1) + "\n")
    print(json.dumps(recorded))


if __name__ == "__main__":
    main()
