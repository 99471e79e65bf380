"""SIMD registers as numba types; each operation is an LLVM vector instruction, lowered for the CPU numba targets."""

import operator
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.target import TARGET

INT32 = ir.IntType(32)


class Vector(types.Type):
    """`lanes` numbers of one type in a register, or in several where the CPU's registers are shorter."""

    def __init__(self, element: types.Number, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, llvm_type(fe_type))


# The kernels think in 64 bytes: one register of AVX-512, two of AVX2, four of NEON or SSE.
u8x64, i8x64 = Vector(types.uint8, 64), Vector(types.int8, 64)
u8x32, i8x32 = Vector(types.uint8, 32), Vector(types.int8, 32)
u8x16, i8x16 = Vector(types.uint8, 16), Vector(types.int8, 16)
u16x32, i16x32 = Vector(types.uint16, 32), Vector(types.int16, 32)
u16x16, i16x16 = Vector(types.uint16, 16), Vector(types.int16, 16)
i32x16, f32x16 = Vector(types.int32, 16), Vector(types.float32, 16)
u32x16 = Vector(types.uint32, 16)
u32x8, i32x8, f32x8 = Vector(types.uint32, 8), Vector(types.int32, 8), Vector(types.float32, 8)
u16x8 = Vector(types.uint16, 8)
u16x4, i16x4 = Vector(types.uint16, 4), Vector(types.int16, 4)
f32x2, f32x4 = Vector(types.float32, 2), Vector(types.float32, 4)


def llvm_type(t: Any) -> ir.Type:
    """The LLVM type of a scalar or vector."""
    if isinstance(t, Vector):
        return ir.VectorType(llvm_type(t.element), t.lanes)
    if isinstance(t, types.Float):
        return ir.FloatType() if t.bitwidth == 32 else ir.DoubleType()
    return ir.IntType(t.bitwidth)


def constant(t: Vector, values: int | float | Sequence[int | float]) -> ir.Constant:
    """A vector constant; one number stands for all lanes."""
    lanes = list(values) if isinstance(values, Sequence) else [values] * t.lanes
    return ir.Constant(llvm_type(t), lanes)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic by its full name."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def suffix(t: ir.Type) -> str:
    """The part of an LLVM intrinsic's name that says the type: v16f32."""
    if isinstance(t, ir.VectorType):
        return f"v{t.count}{suffix(t.element)}"
    return "f32" if isinstance(t, ir.FloatType) else f"i{t.width}"


def rearrange(builder: ir.IRBuilder, a: ir.Value, indices: Sequence[int], b: ir.Value | None = None) -> ir.Value:
    """Pick lanes from a (and b, whose lanes count on from a's)."""
    mask = ir.Constant(ir.VectorType(INT32, len(indices)), list(indices))
    return builder.shuffle_vector(a, ir.Constant(a.type, ir.Undefined) if b is None else b, mask)


def spread(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """One scalar in all lanes."""
    vector_type = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(INT32, 0))
    return rearrange(builder, first, [0] * lanes)


def load_at(builder: ir.IRBuilder, address: ir.Value, t: ir.Type, offset: int = 0) -> ir.Value:
    """Read memory at an address that need not be aligned."""
    if offset:
        address = builder.add(address, ir.Constant(address.type, offset))
    value = builder.load(builder.inttoptr(address, t.as_pointer()))
    value.align = 1
    return value


def store_at(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, offset: int = 0) -> None:
    """Write memory at an address that need not be aligned."""
    if offset:
        address = builder.add(address, ir.Constant(address.type, offset))
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def in_registers(builder: ir.IRBuilder, args: Sequence[ir.Value], function: Any) -> ir.Value:
    """Apply a function of register-sized vectors to larger ones."""
    lanes = TARGET.register_bytes * 8 // args[0].type.element.width
    n = args[0].type.count // lanes
    if n <= 1:
        return function(*args)
    parts = []
    for i in range(n):
        pieces = [(a, a.type.count // n) for a in args]
        parts.append(function(*(rearrange(builder, a, range(i * size, (i + 1) * size)) for a, size in pieces)))
    while len(parts) > 1:
        both = range(2 * parts[0].type.count)
        parts = [rearrange(builder, a, both, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


# ---- memory


@intrinsic
def load(typingctx: Any, kind: Any, address: Any) -> Any:
    """load(f32x16, address): the vector or scalar at a raw address, aligned or not."""
    result = kind.instance_type

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return load_at(builder, args[1], llvm_type(result))

    return result(kind, types.int64), codegen


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """store(address, value): write a vector or scalar."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        store_at(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address in one atomic step; returns what was there before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")  # what was written before is seen by the next

    return types.int64(types.int64, types.int64), codegen


@inline_kernel
def address_of(array):
    """Address of a numpy array's first element; the array must be used once more after the address is."""
    return types.int64(array.ctypes.data)  # numba's is unsigned: int64 plus uint64 would make it a float


# ---- making and converting


@intrinsic
def splat(typingctx: Any, kind: Any, scalar: Any) -> Any:
    """splat(f32x16, x): x in all lanes."""
    vector = kind.instance_type

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return spread(builder, args[1], vector.lanes)

    return vector(kind, vector.element), codegen


@intrinsic
def convert(typingctx: Any, kind: Any, value: Any) -> Any:
    """convert(f32x16, v): the same numbers in another type; integers keep their low bits when narrowed."""
    result = kind.instance_type

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, target, v = value.element, result.element, args[1]
        goal = llvm_type(result)
        if isinstance(target, types.Float):
            return builder.sitofp(v, goal) if source.signed else builder.uitofp(v, goal)
        if isinstance(source, types.Float):
            return builder.fptosi(v, goal)
        if source.bitwidth == target.bitwidth:
            return v
        if source.bitwidth > target.bitwidth:
            return builder.trunc(v, goal)
        return builder.sext(v, goal) if source.signed else builder.zext(v, goal)

    return result(kind, value), codegen


@intrinsic
def hidden(typingctx: Any, value: Any) -> Any:
    """The same vector or whole number, of which LLVM shall not know how it was made."""
    is_vector = isinstance(value, Vector)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        t = args[0].type
        fits = not is_vector or value.lanes * value.element.bitwidth <= 8 * TARGET.register_bytes
        if TARGET.is_x86 and fits:
            place = "=v,0" if is_vector else "=r,0"
            return builder.asm(ir.FunctionType(t, [t]), "", place, args, side_effect=False)
        return args[0]

    return value(value), codegen


@intrinsic
def in_turn(typingctx: Any, value: Any) -> Any:
    """The same vector, made between what is asked for in the text before and behind it.

    LLVM knows no order between requests for cache lines and arithmetic, and collects them at the end of a loop.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not TARGET.is_x86:
            return args[0]
        own = min(value.lanes, 8 * TARGET.register_bytes // value.element.bitwidth)  # lanes of its first register
        first = args[0] if own == value.lanes else rearrange(builder, args[0], range(own))
        made = builder.asm(ir.FunctionType(first.type, [first.type]), "", "=v,0", [first], side_effect=True)
        if own == value.lanes:
            return made
        made = rearrange(builder, made, [i % own for i in range(value.lanes)])
        return rearrange(builder, made, [i if i < own else value.lanes + i for i in range(value.lanes)], args[0])

    return value(value), codegen


@intrinsic
def view(typingctx: Any, kind: Any, value: Any) -> Any:
    """view(u16x32, v): the same bits as another type."""
    result = kind.instance_type

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[1], llvm_type(result))

    return result(kind, value), codegen


@intrinsic
def join(typingctx: Any, low: Any, high: Any) -> Any:
    """Two vectors as one of twice the lanes."""
    result = Vector(low.element, 2 * low.lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return rearrange(builder, args[0], range(2 * low.lanes), args[1])

    return result(low, low), codegen


def _part(first: int) -> Any:
    @intrinsic
    def part(typingctx: Any, value: Any) -> Any:
        lanes = value.lanes // 2

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return rearrange(builder, args[0], range(first * lanes, (first + 1) * lanes))

        return Vector(value.element, lanes)(value), codegen

    return part


low_half, high_half = _part(0), _part(1)


def shifter(amounts: Sequence[int]) -> Any:
    """Make an operation that shifts equal parts of a vector right, or left where negative, each by its own constant."""
    is_left = min(amounts) < 0

    @intrinsic
    def shift(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            by = constant(value, [abs(a) for a in amounts for _ in range(value.lanes // len(amounts))])
            return builder.shl(args[0], by) if is_left else builder.lshr(args[0], by)

        return value(value), codegen

    return shift


def masker(masks: Sequence[int]) -> Any:
    """Make an operation that keeps bits of equal parts of a vector, each part those of its own constant."""

    @intrinsic
    def mask(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            per_lane = [m for m in masks for _ in range(value.lanes // len(masks))]
            return builder.and_(args[0], constant(value, per_lane))

        return value(value), codegen

    return mask


# ---- arithmetic: a + b, a - b, a * b, a / b of floats, a & b, a | b, a ^ b, a << n, a >> n, where b may be a scalar


def _lower(name: str, t: Any) -> str:
    if isinstance(t, types.Float):
        return "f" + name
    return {"shr": "ashr" if t.signed else "lshr"}.get(name, name)


def _register_operator(op: Any, name: str) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            a, b = args
            if isinstance(a, Vector) and (a == b or isinstance(b, types.Number)):
                return signature(a, a, a if a == b else a.element)
            return None

    @lower_builtin(op, Vector, Vector)
    @lower_builtin(op, Vector, types.Number)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = args
        if not isinstance(sig.args[1], Vector):
            b = spread(builder, b, sig.args[0].lanes)
        return getattr(builder, _lower(name, sig.args[0].element))(a, b)


for _op, _name in {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
    operator.lshift: "shl",
    operator.rshift: "shr",
}.items():
    _register_operator(_op, _name)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, in one step where the CPU has it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        t = llvm_type(a)
        return call(builder, f"llvm.fmuladd.{suffix(t)}", t, args)  # llvm.fma would call libm on CPUs without it

    return a(a, a, a), codegen


@intrinsic
def rounded(typingctx: Any, value: Any) -> Any:
    """The nearest whole numbers, halves to even."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        t = llvm_type(value)
        return call(builder, f"llvm.rint.{suffix(t)}", t, args)

    return value(value), codegen


@intrinsic
def absolute(typingctx: Any, value: Any) -> Any:
    """The numbers without their signs."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        t = llvm_type(value)
        return call(builder, f"llvm.fabs.{suffix(t)}", t, args)

    return value(value), codegen


@intrinsic
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger number of each lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return a(a, a), codegen


@intrinsic
def reduce_add(typingctx: Any, value: Any) -> Any:
    """The sum of all lanes, always added in the same order: halves onto halves."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v, add = args[0], builder.fadd if isinstance(value.element, types.Float) else builder.add
        lanes = value.lanes
        while lanes > 1:
            lanes //= 2
            v = add(rearrange(builder, v, range(lanes)), rearrange(builder, v, range(lanes, 2 * lanes)))
        return builder.extract_element(v, ir.Constant(INT32, 0))

    return value.element(value), codegen


@intrinsic
def where_positive(typingctx: Any, value: Any, yes: Any, no: Any) -> Any:
    """The lanes of `yes` where a float is larger than zero, those of `no` elsewhere."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        is_positive = builder.fcmp_ordered(">", args[0], constant(value, 0.0))
        return builder.select(is_positive, args[1], args[2])

    return yes(value, yes, yes), codegen


@intrinsic
def reduce_max(typingctx: Any, value: Any) -> Any:
    """The largest of all lanes of floats, none of which is NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v, lanes = args[0], value.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (rearrange(builder, v, range(n, n + lanes)) for n in (0, lanes))
            v = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(v, ir.Constant(INT32, 0))

    return value.element(value), codegen


@intrinsic
def first_lane(typingctx: Any, value: Any) -> Any:
    """The number in lane 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(INT32, 0))

    return value.element(value), codegen
