"""Print the assembly of a format's product for a CPU that need not be this one: FORMAT TRIPLE CPU FEATURE,FEATURE...

With the name of a kind of latent cache in place of a block format, it is that of attention.

Run as a script, in a process of its own: the vector code is told of another target before it is imported.
"""

import re
import sys

import llvmlite.binding as llvm
from numba import types
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu import CPUContext

import edge_moe.kernels.target as target


def main(format_name, triple, cpu, features):
    target.TARGET = target.target_of(triple, set(features), cpu)
    from edge_moe.kernels.attention import FORMATS, attend_units
    from edge_moe.kernels.blocks import TAGS
    from edge_moe.kernels.product_units import product_units

    modules = []
    # Machine code for another CPU is neither made nor entered by numba; any builtin function will do for the entry.
    JITCodeLibrary._finalize_specific = lambda self: modules.append(str(self._final_module))
    CPUContext.get_executable = lambda *args: [].append
    kernel, tag = product_units, TAGS.get(format_name)
    if tag is None:  # the name of a kind of latent cache
        kernel, tag = attend_units, FORMATS[format_name]
    kernel._cache = NullCache()
    kernel.compile((tag, types.int64))
    with global_compiler_lock:
        kernel.overloads[tag, types.int64].library.finalize()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, opt=3, features=",".join(f"+{feature}" for feature in features)
    )
    for text in modules:
        module = llvm.parse_assembly(re.sub(r'target (triple|datalayout) = ".*"\n', "", text))
        module.triple = triple
        print(machine.emit_assembly(module))


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4].split(","))
