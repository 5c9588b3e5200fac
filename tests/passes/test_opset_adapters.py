"""Every adapter of `convert-opset`: the operators it writes, and ONNX Runtime's run of the old model against the new."""

import pytest
from exactness import op_types
from opset_conversion import convert, model

# One line a case: the old opset, the graph, the operators expected after.
CASES: dict[str, tuple[int, str, list[str]]] = {
    "clip": (7, "(float[N,4] x) => (float[N,4] y) { y = Clip<min = -0.5, max = 0.25>(x) }", ["Clip"]),
    "clip one side": (10, "(float[N,4] x) => (float[N,4] y) { y = Clip<min = -0.5>(x) }", ["Clip"]),
    "clip unbounded": (10, "(float[N,4] x) => (float[N,4] y) { y = Clip(x) }", ["Clip"]),
    "clip undeclared": (
        10,
        "(float[N,4] x) => (float[N,4] y) { a = Relu(x)  y = Clip<max = 0.25>(a) }",
        ["Relu", "Clip"],
    ),
    "pad": (7, "(float[N,4] x) => (float[P,Q] y) { y = Pad<pads = [0,1,1,2], value = 0.5>(x) }", ["Pad"]),
    "pad reflect": (10, '(float[N,4] x) => (float[P,Q] y) { y = Pad<mode = "reflect", pads = [0,1,0,2]>(x) }', ["Pad"]),
    "pad undeclared": (
        10,
        "(float[N,4] x) => (float[P,Q] y) { a = Exp(x)  y = Pad<pads = [0,1,1,2], value = 0.5>(a) }",
        ["Exp", "Pad"],
    ),
    "slice": (
        9,
        "(float[N,4] x) => (float[P,Q] y) { y = Slice<axes = [1], starts = [-3], ends = [99]>(x) }",
        ["Slice"],
    ),
    "slice default axes": (
        7,
        "(float[N,4] x) => (float[P,Q] y) { y = Slice<starts = [0,1], ends = [1,3]>(x) }",
        ["Slice"],
    ),
    "topk": (9, "(float[N,4] x) => (float[N,2] y, int64[N,2] i) { y, i = TopK<k = 2, axis = 1>(x) }", ["TopK"]),
    "topk 10": (
        10,
        "(float[N,4] x) => (float[N,P] y) <int64[1] k = {3}> { y, i = TopK(x, k) }",
        ["TopK"],
    ),
    "unsqueeze by no axis": (
        11,
        "(float[N,4] x) => (float[N,4] y) { y = Unsqueeze<axes : ints = []>(x) }",
        ["Unsqueeze"],
    ),
    "squeeze": (12, "(float[N,1,4,1] x) => (float[N,4] y) { y = Squeeze<axes = [1,-1]>(x) }", ["Squeeze"]),
    "squeeze all": (12, "(float[2,1,4,1] x) => (float[2,4] y) { y = Squeeze(x) }", ["Squeeze"]),
    "unsqueeze": (7, "(float[N,4] x) => (float[1,N,4,1] y) { y = Unsqueeze<axes = [0,3]>(x) }", ["Unsqueeze"]),
    "reduce sum": (12, "(float[N,4] x) => (float[N] y) { y = ReduceSum<axes = [1], keepdims = 0>(x) }", ["ReduceSum"]),
    "reduce mean": (17, "(float[N,4] x) => (float[N,1] y) { y = ReduceMean<axes = [-1]>(x) }", ["ReduceMean"]),
    "reduce max over all": (9, "(float[N,4] x) => (float[1,1] y) { y = ReduceMax(x) }", ["ReduceMax"]),
    "reduce log sum exp": (
        13,
        "(float[N,4] x) => (float[1,4] y) { y = ReduceLogSumExp<axes = [0]>(x) }",
        ["ReduceLogSumExp"],
    ),
    "split": (
        7,
        "(float[N,4] x) => (float[N,1] a, float[N,3] b) { a, b = Split<axis = 1, split = [1,3]>(x) }",
        ["Split"],
    ),
    "split evenly": (13, "(float[N,4] x) => (float[N,2] a, float[N,2] b) { a, b = Split<axis = 1>(x) }", ["Split"]),
    "softmax last": (11, "(float[N,4] x) => (float[N,4] y) { y = Softmax<axis = -1>(x) }", ["Softmax"]),
    "softmax default, rank 2": (9, "(float[N,4] x) => (float[N,4] y) { y = Softmax(x) }", ["Softmax"]),
    "softmax default, rank 3": (
        9,
        "(float[N,3,4] x) => (float[N,3,4] y) { y = Softmax(x) }",
        ["Shape", "Flatten", "Softmax", "Reshape"],
    ),
    "log softmax, middle": (
        11,
        "(float[N,3,4,5] x) => (float[N,3,4,5] y) { y = LogSoftmax<axis = -2>(x) }",
        ["Shape", "Flatten", "LogSoftmax", "Reshape"],
    ),
    "hardmax of everything": (
        12,
        "(float[N,4] x) => (float[N,4] y) { y = Hardmax<axis = 0>(x) }",
        ["Shape", "Flatten", "Hardmax", "Reshape"],
    ),
    "softmax of a computed reshape": (
        12,
        """(float[N,3,4] x) => (float[A,B,C] y) <int64[1] m = {-1}, int64[1] three = {3}> {
            zero = Constant<value = int64[1] {0}>()  one = Constant<value = int64[1] {1}>()
            s = Shape(x)  n = Slice(s, zero, one)  t = Concat<axis = 0>(n, m, three)
            r = Reshape(x, t)  y = Softmax<axis = 2>(r) }""",
        ["Shape", "Slice", "Concat", "Reshape", "Softmax"],
    ),
    "batch norm": (
        7,
        """(float[N,2,3] x, float[2] s, float[2] b, float[2] m) => (float[N,2,3] y) <float[2] v = {1, 2}>
        { y = BatchNormalization<epsilon = 0.01, spatial = 1>(x, s, b, m, v) }""",
        ["BatchNormalization"],
    ),
    "dropout": (7, "(float[N,4] x) => (float[N,4] y) { y = Dropout<ratio = 0.3>(x) }", ["Dropout"]),
    "dropout, mask unused": (10, "(float[N,4] x) => (float[N,4] y) { y, mask = Dropout(x) }", ["Dropout"]),
    "upsample 7": (
        7,
        '(float[1,2,3,4] x) => (float[1,2,6,12] y) { y = Upsample<mode = "nearest", scales = [1.0,1.0,2.0,3.0]>(x) }',
        ["Resize"],
    ),
    "upsample 9": (
        9,
        """(float[1,2,3,4] x) => (float[1,2,P,Q] y) <float[4] s = {1, 1, 2.3, 1.7}> { y = Upsample<mode = "nearest">(x, s) }""",
        ["Resize"],
    ),
    "upsample linear": (
        9,
        """(float[1,2,3,4] x) => (float[1,2,P,Q] y) <float[4] s = {1, 1, 2.3, 1.7}> { y = Upsample<mode = "linear">(x, s) }""",
        ["Resize"],
    ),
    "upsample, computed scales": (
        9,
        "(float[1,2,3,4] x, float[4] f) => (float[A,B,P,Q] y) { g = Abs(f)  s = Exp(g)  y = Upsample(x, s) }",
        ["Abs", "Exp", "Resize"],
    ),
    "resize 10 up": (
        10,
        "(float[1,2,3,4] x) => (float[1,2,P,Q] y) <float[4] s = {1, 1, 2.6, 1.3}> { y = Resize(x, s) }",
        ["Resize"],
    ),
    "resize 10 down": (
        10,
        "(float[1,2,7,9] x) => (float[1,2,P,Q] y) <float[4] s = {1, 1, 0.6, 0.7}> { y = Resize(x, s) }",
        ["Resize"],
    ),
    "resize 10 linear": (
        10,
        """(float[1,2,7,9] x) => (float[1,2,P,Q] y) <float[4] s = {1, 1, 0.6, 1.7}> { y = Resize<mode = "linear">(x, s) }""",
        ["Resize"],
    ),
    "resize 11 by sizes": (
        11,
        """(float[1,2,3,4] x) => (float[1,2,P,Q] y)
        <float[0] roi = {}, float[0] none = {}, int64[4] sizes = {1, 2, 5, 7}> {
            y = Resize<mode = "linear", coordinate_transformation_mode = "align_corners">(x, roi, none, sizes) }""",
        ["Resize"],
    ),
    "resize 11 by scales": (
        11,
        """(float[1,2,3,4] x) => (float[1,2,P,Q] y) <float[0] roi = {}, float[4] s = {1, 1, 1.5, 2.5}> {
            y = Resize<mode = "cubic">(x, roi, s) }""",
        ["Resize"],
    ),
    "scatter": (
        9,
        "(float[N,4] x, int64[N,1] i, float[N,1] u) => (float[N,4] y) { y = Scatter<axis = 1>(x, i, u) }",
        ["ScatterElements"],
    ),
    "grid sample": (
        16,
        """(float[1,2,3,4] x, float[1,5,6,2] g) => (float[1,2,5,6] y, float[1,2,5,6] z) {
            y = GridSample(x, g)  z = GridSample<mode = "bicubic">(x, g) }""",
        ["GridSample", "GridSample"],
    ),
    "dft": (17, "(float[1,6,2] x) => (float[1,6,2] y) { y = DFT<axis = 1>(x) }", ["DFT"]),
    "dft default axis": (17, "(float[1,6,4,1] x) => (float[P,Q,R,S] y) { y = DFT<onesided = 1>(x) }", ["DFT"]),
    "group norm": (
        18,
        """(float[N,6,4] x, float[3] s, float[3] b) => (float[N,6,4] y)
        { y = GroupNormalization<num_groups = 3, epsilon = 0.01>(x, s, b) }""",
        [
            "Shape",
            "Div",
            "Concat",
            "Reshape",
            "Expand",
            "Reshape",
            "Reshape",
            "Expand",
            "Reshape",
            "GroupNormalization",
        ],
    ),
    "mean and variance": (
        9,
        "(float[N,2,3,4] x) => (float[N,2,3,4] y) { y = MeanVarianceNormalization(x) }",
        ["MeanVarianceNormalization"],
    ),
    "lstm": (
        7,
        """(float[5,N,3] x, float[1,8,3] w, float[1,8,2] r) => (float[5,1,N,2] y)
        { y = LSTM<hidden_size = 2>(x, w, r) }""",
        ["LSTM"],
    ),
    "quantize": (
        10,
        """(float[N,4] x) => (float[N,4] y) <float s = {0.1}, uint8 z = {128}> {
            q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }""",
        ["QuantizeLinear", "DequantizeLinear"],
    ),
    "one hot": (9, "(int64[N] i, float[2] v) => (float[N,P] y) <int64 d = {3}> { y = OneHot(i, d, v) }", ["OneHot"]),
    "max of two": (7, "(float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Max(x, z) }", ["Max"]),
    "depth to space": (
        10,
        "(float[N,8,2,3] x) => (float[N,2,4,6] y) { y = DepthToSpace<blocksize = 2>(x) }",
        ["DepthToSpace"],
    ),
    "scan 8": (
        8,
        """(float[N,M,4] x, float[N,4] s) => (float[N,4] last, float[N,M,4] all) {
            last, all = Scan<num_scan_inputs = 1, body = run (float[4] a, float[4] b) => (float[4] c, float[4] d)
                { c = Add(a, b)  d = Identity(c) }>("", s, x) }""",
        ["Scan"],
    ),
    "scan 8 in both directions": (
        8,
        """(float[N,M,4] x, float[N,4] s) => (float[N,4] last, float[N,M,4] all) {
            last, all = Scan<num_scan_inputs = 2, directions = [0, 1],
                body = run (float[4] a, float[4] b, float[4] e) => (float[4] c, float[4] d)
                { f = Sub(b, e)  c = Add(a, f)  d = Identity(c) }>("", s, x, x) }""",
        ["Scan"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_adapter(case: str) -> None:
    opset, graph, expected = CASES[case]
    after, _ = convert(model(opset, graph))
    assert op_types(after) == expected
