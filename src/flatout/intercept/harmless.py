"""Instructions, functions and attributes without side effects; all others are assumed to have
some."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


WITHOUT_EFFECT = _words(
    "CACHE EXTENDED_ARG NOP RESUME PRECALL COPY_FREE_VARS MAKE_CELL NOT_TAKEN PUSH_NULL KW_NAMES "
    "GEN_START LOAD_CLOSURE"
)
"""Instructions that are ignored."""

HARMLESS_INSTRUCTIONS = _words(
    "LOAD_FAST STORE_FAST DELETE_FAST STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST LOAD_DEREF "
    "STORE_DEREF LOAD_GLOBAL LOAD_CONST LOAD_SMALL_INT LOAD_ATTR LOAD_COMMON_CONSTANT "
    "LOAD_ASSERTION_ERROR RETURN_VALUE RETURN_CONST RETURN_GENERATOR YIELD_VALUE "
    "BINARY_SUBSCR BINARY_SLICE BINARY_OP BINARY_ADD BINARY_SUBTRACT BINARY_MULTIPLY "
    "BINARY_TRUE_DIVIDE BINARY_FLOOR_DIVIDE BINARY_MODULO BINARY_POWER BINARY_AND BINARY_OR "
    "BINARY_XOR BINARY_LSHIFT BINARY_RSHIFT UNARY_NEGATIVE UNARY_POSITIVE UNARY_NOT UNARY_INVERT "
    "COMPARE_OP IS_OP CONTAINS_OP TO_BOOL BUILD_TUPLE BUILD_LIST BUILD_SET BUILD_MAP BUILD_STRING "
    "BUILD_SLICE BUILD_CONST_KEY_MAP LIST_EXTEND LIST_APPEND LIST_TO_TUPLE SET_ADD SET_UPDATE "
    "MAP_ADD DICT_UPDATE FORMAT_VALUE FORMAT_SIMPLE FORMAT_WITH_SPEC CONVERT_VALUE CALL "
    "CALL_FUNCTION CALL_FUNCTION_KW CALL_FUNCTION_EX CALL_METHOD CALL_KW CALL_INTRINSIC_1 "
    "MAKE_FUNCTION SET_FUNCTION_ATTRIBUTE GET_ITER FOR_ITER END_FOR POP_ITER UNPACK_SEQUENCE "
    "UNPACK_EX POP_TOP DUP_TOP DUP_TOP_TWO ROT_TWO ROT_THREE ROT_FOUR ROT_N SWAP COPY "
    "JUMP_FORWARD JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT JUMP_ABSOLUTE JUMP_IF_FALSE_OR_POP "
    "JUMP_IF_TRUE_OR_POP JUMP_IF_NOT_EXC_MATCH POP_JUMP_IF_FALSE POP_JUMP_IF_TRUE "
    "POP_JUMP_IF_NONE POP_JUMP_IF_NOT_NONE POP_JUMP_FORWARD_IF_FALSE POP_JUMP_FORWARD_IF_TRUE "
    "POP_JUMP_FORWARD_IF_NONE POP_JUMP_FORWARD_IF_NOT_NONE POP_JUMP_BACKWARD_IF_FALSE "
    "POP_JUMP_BACKWARD_IF_TRUE POP_JUMP_BACKWARD_IF_NONE POP_JUMP_BACKWARD_IF_NOT_NONE "
    "RAISE_VARARGS RERAISE SETUP_FINALLY SETUP_WITH BEFORE_WITH WITH_EXCEPT_START POP_BLOCK "
    "POP_EXCEPT PUSH_EXC_INFO CHECK_EXC_MATCH LOAD_SPECIAL"
)
"""Instructions without side effects, of CPython 3.10 to 3.14."""

REASONS = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "STORE_SUBSCR": "writes into a container or a tensor",
    "STORE_SLICE": "writes into a container or a tensor",
    "DELETE_SUBSCR": "deletes from a container",
    "IMPORT_NAME": "imports a module",
    "LOAD_SUPER_ATTR": "calls super()",
    "DICT_MERGE": "passes on keyword arguments",
    "BINARY_MATRIX_MULTIPLY": "multiplies matrices",
}
"""Why instructions that are not harmless are rejected, in words for the record."""

KEYWORDS = frozenset(("out", "inplace", "mmap_mode", "allow_pickle"))
"""Names of arguments that give harmless functions side effects."""


_FUNCTIONS = {
    "builtins": "len range int float str bool bytes bytearray complex tuple list dict set "
    "frozenset min max sum abs round zip enumerate reversed sorted map filter any all isinstance "
    "divmod pow chr ord slice object",
    "math": "acos asin atan atan2 ceil comb copysign cos cosh degrees dist exp expm1 fabs "
    "factorial floor fmod fsum gamma gcd hypot isclose isfinite isinf isnan isqrt lcm ldexp lgamma "
    "log log10 log1p log2 modf perm pow prod radians remainder sin sinh sqrt tan tanh trunc",
    "posixpath": "join basename dirname splitext normpath",
    "torch": "tensor as_tensor from_numpy frombuffer stack cat zeros ones full arange linspace eye "
    "zeros_like ones_like full_like where sin cos tan exp log sqrt abs sigmoid tanh clamp roll "
    "flip rot90 flatten reshape squeeze unsqueeze permute transpose Tensor FloatTensor LongTensor "
    "Generator Size device is_tensor sum mean std var",
    "torch.nn.functional": "one_hot pad interpolate",
    "numpy": "array asarray ascontiguousarray frombuffer zeros ones full arange linspace eye stack "
    "pad where transpose flip fliplr flipud rot90 moveaxis expand_dims squeeze ndarray float16 "
    "float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 bool_",
    "PIL.Image": "fromarray new frombytes Image",
    "itertools": "chain islice product zip_longest repeat",
    "operator": "itemgetter add sub mul neg truediv",
}
_DRAWING = {
    "torch": "rand randn randint randperm normal bernoulli multinomial rand_like randn_like",
    "random": "random randint uniform choice choices sample gauss randrange normalvariate "
    "betavariate triangular getrandbits",
    "numpy.random": "rand randn randint random uniform normal choice permutation default_rng "
    "random_sample beta standard_normal integers",
}
_READING = {
    "PIL.Image": "open",
    "numpy": "load",
    "torchvision.datasets.folder": "default_loader pil_loader",
}

ATTRIBUTES = _words(
    # of tensors and arrays
    "shape dtype ndim device T mT size dim numel nbytes itemsize float double half bfloat16 int "
    "long short bool byte to type astype view view_as reshape permute transpose t unsqueeze "
    "squeeze flatten ravel unflatten expand expand_as repeat contiguous clone copy detach numpy "
    "tolist item sum mean std var min max argmax argmin abs sqrt exp log sin cos tanh sigmoid "
    "clamp clip round floor ceil div mul add sub pow neg eq ne lt le gt ge any all flip roll "
    "unfold narrow select index_select gather chunk split unbind masked_fill nonzero swapaxes "
    "tobytes real imag "
    # of strings, paths and containers
    "format join strip lstrip rstrip lower upper title replace startswith endswith encode decode "
    "zfill find index count splitlines rsplit partition rpartition isdigit isalpha casefold get "
    "items keys values name stem suffix parent parts joinpath with_suffix with_name start stop "
    "step from_iterable group groups match search fullmatch findall "
    # of images
    "convert crop resize rotate mode width height getbands filter getpixel "
    # of generators that the sample has created itself
    "manual_seed normal random integers uniform standard_normal permutation choice"
)
"""Attributes and methods that may be used on a value of unknown type, because they have no side
effects on any type that it may have: tensors, arrays, strings, paths, containers, images."""

READING_ATTRIBUTES = frozenset(("read_bytes", "read_text"))

LIFE = _words(
    "__init__ __new__ __del__ __repr__ __str__ __format__ __reduce__ __reduce_ex__ __getstate__ "
    "__setstate__ __dir__ __sizeof__ __init_subclass__ __class_getitem__ __copy__ "
    "__deepcopy__"
)
"""Special methods that code fetching a sample does not call implicitly."""

BASES = frozenset(("torch.utils.data.dataset", "typing", "abc"))
"""Modules whose base classes do nothing when a sample is fetched."""


TEXTS = frozenset(("__repr__", "__str__", "__format__"))
"""Special methods that are called when an object is converted to text."""

MAKE_TEXT = frozenset(("str", "repr", "format"))
"""Names of functions and methods that convert objects to text."""


class Harmless(NamedTuple):
    """A function or class that may be called.

    Attributes:
        name: its name, with the name of its module.
        draws: whether it may draw random numbers.
        opens: whether it reads files.
    """

    name: str
    draws: bool
    opens: bool


_by_identity: dict[int, tuple[Any, Harmless]] = {}
"""The functions and classes that may be called, by identity. They are looked up when their module
is first found to be imported, because the program may replace them later."""

_registered: set[tuple[str, bool, bool]] = set()


def register_modules() -> None:
    """Look up the harmless functions of all modules that have been imported since the last call."""
    for table, draws, opens in (
        (_FUNCTIONS, False, False),
        (_DRAWING, True, False),
        (_READING, False, True),
    ):
        for module, names in table.items():
            if module not in sys.modules or (module, draws, opens) in _registered:
                continue
            _registered.add((module, draws, opens))
            for name in names.split():
                value = vars(sys.modules[module]).get(name)
                owner = getattr(value, "__module__", None) or module
                is_own = owner.partition(".")[0] == module.partition(".")[0]
                if value is not None and (is_own or type(value) is not types.FunctionType):
                    _by_identity[id(value)] = (
                        value,
                        Harmless(f"{module}.{name}", draws, opens),
                    )


def known_function(value: Any) -> Harmless | None:
    """The entry of a function or class that may be called; ``None`` for any other value."""
    entry = _by_identity.get(id(value))
    return None if entry is None else entry[1]
