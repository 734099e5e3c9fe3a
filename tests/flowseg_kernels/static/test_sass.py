"""The reader of machine code, on a small listing counted by hand."""

import pytest

from . import sass

LISTING = """
		Function : outer
        /*0000*/                   MOV R1, c[0x0][0x28] ;                     /* 0x1 */
                                                                              /* 0x2 */
        /*0010*/                   LDS.128 R4, [R2] ;
        /*0020*/                   FFMA R0, R4, R4, R0 ;
        /*0030*/              @!P0 BRA 0x60 ;
        /*0040*/               @P1 FADD.FTZ R0, R0, R5 ;
        /*0050*/                   MUFU.RCP R6, R0 ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/              @!P2 BRA P1, 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
		Function : straight
        /*0000*/                   EXIT ;
"""


def test_loops_and_opcodes_of_a_listing():
    functions = sass.parse(LISTING)
    assert list(functions) == ["outer", "straight"] and len(functions["outer"]) == 10
    assert [(loop.first, loop.last) for loop in sass.loops(functions["outer"])] == [(0x20, 0x60), (0x10, 0x70)]
    (inner,) = sass.innermost_loops(functions["outer"])
    assert inner.opcodes() == {"FFMA": 1, "BRA": 2, "FADD": 1, "MUFU": 1} and len(inner) == 5
    assert inner.body[2].predicate == "@P1" and sass.innermost_loops(functions["straight"]) == []


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(sass, "find_tool", lambda name: None)
    with pytest.raises(FileNotFoundError, match="cuobjdump was not found"):
        sass.disassemble("no.cubin")
