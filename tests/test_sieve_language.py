"""What is a Sieve script and what is not, and how the checker says so.

Where a script is wrong, a guillemet stands before the token at fault: there, by line and column, the error must be
reported. Where it stands twice, either place will do. A column is counted in characters, from 1.
"""

from __future__ import annotations

import pytest
from harness import Site
from sieve import Sieve, script_text

MARK = "\u00ab"
NUMERIC = "comparator-i;ascii-numeric"

# What a script must require before it may say this.
CAPABILITIES = [
    ("fileinto", "", '«fileinto "x";'),
    ("envelope", "", 'if «envelope "from" "x" { keep; }'),
    ("copy", "fileinto", 'fileinto «:copy "x";'),
    ("imap4flags", "", 'keep «:flags "x";'),
    ("imap4flags", "fileinto", 'fileinto «:flags "x" "y";'),
    ("imap4flags", "", '«setflag "x";'),
    ("imap4flags", "", '«addflag "x";'),
    ("imap4flags", "", '«removeflag "x";'),
    ("imap4flags", "", 'if «hasflag "x" { keep; }'),
    ("relational", "", 'if header «:value "eq" "a" "b" { keep; }'),
    ("relational", "", 'if header «:count "eq" "a" "1" { keep; }'),
    ("comparator-i;ascii-numeric", "", 'if header :comparator «"i;ascii-numeric" "a" "b" { keep; }'),
    ("comparator-i;unicode-casemap", "", 'if header :comparator «"i;unicode-casemap" "a" "b" { keep; }'),
    ("variables", "", '«set "a" "b";'),
    ("variables", "", 'if «string "a" "b" { keep; }'),
    ("variables", "imap4flags", '«setflag «"variable" "flag";'),
    ("variables", "include", '«global "a";'),
    ("subaddress", "", 'if address «:detail "to" "b" { keep; }'),
    ("subaddress", "envelope", 'if envelope «:user "to" "b" { keep; }'),
    ("body", "", 'if «body "b" { keep; }'),
    ("date", "", 'if «date "date" "year" "1" { keep; }'),
    ("date", "", 'if «currentdate "year" "1" { keep; }'),
    ("index", "", 'if header «:index 1 "a" "b" { keep; }'),
    ("index", "date", 'if date «:index 1 "date" "year" "1" { keep; }'),
    ("environment", "", 'if «environment "name" "b" { keep; }'),
    ("include", "", '«include "a";'),
    ("include", "", "«return;"),
    ("include", "variables", 'set «"global.a" "b";'),
    ("include", "variables fileinto", 'fileinto «"${global.a}";'),
    ("ihave", "", 'if «ihave "copy" { keep; }'),
    ("ihave", "", '«error "a";'),
    ("mailbox", "", 'if «mailboxexists "a" { keep; }'),
    ("mailbox", "fileinto", 'fileinto «:create "a";'),
    ("special-use", "", 'if «specialuse_exists "\\\\Junk" { keep; }'),
    ("special-use", "fileinto", 'fileinto «:specialuse "\\\\Junk" "a";'),
    ("duplicate", "", "if «duplicate { keep; }"),
    ("mime", "", 'if header «:mime "a" "b" { keep; }'),
    ("mime", "", 'if exists «:mime "a" { keep; }'),
    ("foreverypart", "", "«foreverypart { keep; }"),
    ("extracttext", "foreverypart variables", 'foreverypart { «extracttext "a"; }'),
    ("editheader", "", '«addheader "A" "b";'),
    ("editheader", "", '«deleteheader "A";'),
    ("spamtest", "", 'if «spamtest "1" { keep; }'),
    ("spamtestplus", "spamtest", 'if spamtest «:percent "1" { keep; }'),
    ("virustest", "", 'if «virustest "1" { keep; }'),
    ("regex", "", 'if header «:regex "a" "b" { keep; }'),
    ("regex", "variables", 'set «:quoteregex "a" "b";'),
]

WRONG: list[tuple[str, str, str]] = [
    # require
    ("", "require «\"nonesuch\";", "nonesuch"),
    ("", 'require ["fileinto", «"fileInto"];', "fileInto"),
    ("", 'require ["fileinto",\n  "copy",\n  «"nonesuch"];', "nonesuch"),
    ("", 'require «"comparator-i;nonesuch";', "comparator-i;nonesuch"),
    ("", 'keep;\n«require "fileinto";', "require"),
    ("", 'if true {\n  «require "fileinto";\n}', "require"),
    ("", "require «5;", "string"),
    ("", "«require «;", "require"),
    ("variables", 'require «"${a}";', "variable"),
    # commands and tests
    ("", "«nonesuch;", "nonesuch"),
    ("", "keep;\nkeep;\n  «nonesuch;", "nonesuch"),
    ("", "keep;\r\nkeep;\r\n  «nonesuch;\r\n", "nonesuch"),
    ("", "/* one\n   two */ «nonesuch;", "nonesuch"),
    ("", "# x\nkeep; «nonesuch;", "nonesuch"),
    ("", "if false { «nonesuch; }", "nonesuch"),
    ("", "stop;\n«nonesuch;", "nonesuch"),
    ("", "«keeep;", "keep"),
    ("", "«discrad;", "discard"),
    ("fileinto", '«filinto "x";', "fileinto"),
    ("", 'if «heder "a" "b" { keep; }', "header"),
    ("", 'if not «adress "from" "b" { keep; }', "address"),
    ("", "if anyof (true, «nonesuch) { keep; }", "nonesuch"),
    ("", '«header "a" "b";', "header"),
    ("", "«true;", "true"),
    ("", "if «keep { stop; }", "keep"),
    ("", "if not «discard { stop; }", "discard"),
    ("", "«elsif true { keep; }", "elsif"),
    ("", "«else { keep; }", "else"),
    ("", "if true { keep; } else { stop; }\n«elsif true { keep; }", "elsif"),
    ("", "if true { keep; } else { stop; }\n«else { keep; }", "else"),
    ("", "if true { keep; } stop;\n«else { keep; }", "else"),
    ("", "if true { keep; } «else «if true { stop; }", "elsif"),
    ("", '«"x";', "command"),
    ("", "«5;", "command"),
    ("", "«:is;", "command"),
    # tags
    ("", 'if header «:contain "a" "b" { keep; }', ":contains"),
    ("", 'if header «:match "a" "b" { keep; }', ":matches"),
    ("", 'if address «:localprat "from" "b" { keep; }', ":localpart"),
    ("", 'if header «:comparater "i;octet" "a" "b" { keep; }', ":comparator"),
    ("", 'if header «:domain "a" "b" { keep; }', ":domain"),
    ("", "if size «:above 5 { keep; }", ":above"),
    ("", "keep «:nonesuch;", ":nonesuch"),
    ("", "discard «:copy;", ":copy"),
    ("", "if true «:is { keep; }", ":is"),
    ("", 'if header :is «:contains "a" "b" { keep; }', ":contains"),
    ("", 'if header :is «:is "a" "b" { keep; }', ":is"),
    ("", 'if address :all «:domain "from" "b" { keep; }', ":domain"),
    ("", 'if header :comparator "i;octet" «:comparator "i;octet" "a" "b" { keep; }', ":comparator"),
    ("", "if size :over «:under 5 { keep; }", ":over"),
    ("", "if size :over 5 «:under 6 { keep; }", ":under"),
    ("fileinto copy", 'fileinto :copy «:copy "x";', ":copy"),
    ("", 'if header "a" «:is "b" { keep; }', ":is"),
    ("fileinto copy", 'fileinto "x" «:copy;', ":copy"),
    # arguments
    ("fileinto", "«fileinto«;", "fileinto"),
    ("fileinto", "fileinto «5;", "string"),
    ("fileinto", 'fileinto «["a", "b"];', "string"),
    ("fileinto", 'fileinto "a" «"b";', "fileinto"),
    ("fileinto", 'fileinto "\u00e9\u00e9" «"b";', "fileinto"),
    ("fileinto", 'fileinto text:\nx\n.\n«"b";', "fileinto"),
    ("", 'keep «"x";', "keep"),
    ("", "stop «1;", "stop"),
    ("", 'discard «"x";', "discard"),
    ("", "if «size «5 { keep; }", ":over"),
    ("", 'if size :over «"5" { keep; }', "number"),
    ("", "if size «:over «{ keep; }", "number"),
    ("", 'if «header "a" «{ keep; }', "header"),
    ("", "if «header «{ keep; }", "header"),
    ("", 'if header "a" «5 { keep; }', "string"),
    ("", 'if header "a" "b" «"c" { keep; }', "header"),
    ("", "if exists «5 { keep; }", "string"),
    ("", "if header :comparator «5 { keep; }", "string"),
    ("", 'if header :comparator «["i;octet"] "a" "b" { keep; }', "string"),
    ("environment", 'if environment «["name"] "x" { keep; }', "string"),
    # tests and blocks
    ("", "«if «{ keep; }", "test"),
    ("", "if« «;", "if"),
    ("", "if «not «{ keep; }", "test"),
    ("", "if allof «true { keep; }", "("),
    ("", "if anyof («) { keep; }", "test"),
    ("", "if allof (true «true) { keep; }", ","),
    ("", "if allof (true, «) { keep; }", "test"),
    ("", "if allof (true «{ keep; }", ")"),
    ("", "if true«, false { keep; }", "{"),
    ("", "if true «true { keep; }", "test"),
    ("", "if true «keep«;", "{"),
    ("", "if true« «;", "{"),
    ("", "if true «{\n  keep;\n«", "}"),
    ("", "keep;\n«}", "}"),
    ("", "keep; «)", ")"),
    ("", "«keep «{ stop; }", "semicolon"),
    ("", "if true { keep; } «;", ";"),
    ("", "keep«\n«stop;", "semicolon"),
    ("", "keep«", "semicolon"),
    ("fileinto", 'fileinto ["a" «"b"];', ","),
    ("", 'if exists ["a" «"b"] { keep; }', ","),
    ("", 'if exists ["a", «] { keep; }', "string"),
    ("", "if exists «[«] { keep; }", "string"),
    ("", 'if exists ["a", «5] { keep; }', "string"),
    ("", 'if exists «["a" «{ keep; }', "]"),
    # characters
    ("fileinto", 'fileinto «"x;\nkeep;\n', '"'),
    ("", "keep;\n«/* no end\nkeep;\n", "*/"),
    ("fileinto", "fileinto «text:\nno end\n", "dot"),
    ("fileinto", "fileinto text:« «junk\n.\n;", "text:"),
    ("", "keep «@;", "@"),
    ("", "«\u00e9;", "character"),
    ("", "keep «/ stop;", "/"),
    ("", 'if header «: is "a" "b" { keep; }', ":"),
    ("", "if size :over «5«X { keep; }", "K, M or G"),
    ("", "if size :over «5K«B { keep; }", "K, M or G"),
    ("", "if size :over «-5 { keep; }", "negative"),
    ("", "if size :over «1«.5K { keep; }", "."),
    ("", "«\ufeffkeep;", "byte order mark"),
    ("", "keep;\n«\fkeep;", "character"),
    ("", "keep;\n«\0", "NUL"),
    ("fileinto", 'fileinto «"a«\0b";', "NUL"),
    ("", "# a comment «\0\nkeep;", "NUL"),
    ("fileinto", 'fileinto «"a«\udcff";', "UTF-8"),
    ("", "# a comment «\udce9t\udce9\nkeep;", "UTF-8"),
    # comparators and match types
    ("", 'if header :comparator «"i;nonesuch" "a" "b" { keep; }', "i;nonesuch"),
    (NUMERIC, 'if header «:contains :comparator «"i;ascii-numeric" "a" "1" { keep; }', ":contains"),
    (NUMERIC, 'if header :comparator «"i;ascii-numeric" «:matches "a" "1" { keep; }', ":matches"),
    (f"{NUMERIC} regex", 'if header «:regex :comparator «"i;ascii-numeric" "a" "1" { keep; }', ":regex"),
    ("relational", 'if header :value «"xx" "a" "b" { keep; }', "xx"),
    ("relational", 'if header :count «5 "a" "b" { keep; }', "string"),
    ("relational", 'if header :value "eq" «:is "a" "b" { keep; }', ":is"),
    ("variables relational", 'if header :value «"${a}" "a" "b" { keep; }', "variable"),
    ("variables", 'if header :comparator «"${a}" "a" "b" { keep; }', "variable"),
    ("regex", 'if header :regex "a" «"(" { keep; }', "("),
    ("regex", 'if header :regex "a" ["b", «"[c"] { keep; }', "[c"),
    ("regex", 'if header :regex "a" «"b{2,1}" { keep; }', "b{2,1}"),
    ("regex", 'if header :regex "a" «"(b)\\\\1" { keep; }', "\\1"),
    # addresses, envelope, dates
    ("", 'if address «"subject" "x" { keep; }', "subject"),
    ("", 'if address ["from", «"date"] "x" { keep; }', "date"),
    ("envelope", 'if envelope «"nonesuch" "x" { keep; }', "nonesuch"),
    ("envelope", 'if envelope ["from", «"subject"] "x" { keep; }', "subject"),
    ("date", 'if date :zone «"UTC" "date" "year" "1" { keep; }', "UTC"),
    ("date", 'if date :zone «"+100" "date" "year" "1" { keep; }', "+100"),
    ("date", 'if date :zone "+0000" «:originalzone "date" "year" "1" { keep; }', ":originalzone"),
    ("date", 'if currentdate «:originalzone "year" "1" { keep; }', ":originalzone"),
    ("date", 'if date "date" «"century" "1" { keep; }', "century"),
    ("date", 'if date «["date"] "year" "1" { keep; }', "string"),
    ("index", 'if header «:last "a" "b" { keep; }', ":index"),
    ("index", 'if header :index «"1" "a" "b" { keep; }', "number"),
    # header fields
    ("editheader", 'addheader «"a b" "c";', "a b"),
    ("editheader", 'addheader «"a:" "c";', "a:"),
    ("editheader", 'addheader «"" "c";', "name"),
    ("editheader", 'addheader :last «"\u00e9" "c";', "\u00e9"),
    ("editheader", 'deleteheader «"a b";', "a b"),
    ("editheader", 'deleteheader «:last "a";', ":index"),
    ("editheader", '«addheader "a"«;', "addheader"),
    # variables
    ("variables", 'set «"a b" "c";', "a b"),
    ("variables", 'set «"1" "c";', "1"),
    ("variables", 'set «"1a" "c";', "1a"),
    ("variables", 'set «"" "c";', "name"),
    ("variables", 'set «"${a}" "c";', "variable"),
    ("variables", 'set «"nonesuch.a" "c";', "nonesuch"),
    ("variables", 'set :lower «:upper "a" "c";', ":upper"),
    ("variables", 'set :lowerfirst «:upperfirst "a" "c";', ":upperfirst"),
    ("variables regex", 'set :quotewildcard «:quoteregex "a" "c";', ":quoteregex"),
    ("variables", 'set «:nonesuch "a" "c";', ":nonesuch"),
    ("variables", 'set «:lenght "a" "c";', ":length"),
    ("variables", '«set "a"«;', "set"),
    ("variables fileinto", 'fileinto «"${nonesuch.a}";', "nonesuch"),
    # include
    ("include variables", 'include «"${a}";', "variable"),
    ("include", 'include «"a/b";', "a/b"),
    ("include", 'include «"";', "name"),
    ("include", 'include :personal «:global "a";', ":global"),
    ("include", "return «5;", "return"),
    ("include variables", 'global «"a b";', "a b"),
    ("include variables", 'global ["a", «"1"];', "1"),
    ("include variables", 'global «"global.a";', "global.a"),
    ("include variables", 'set «"global.a.b" "c";', "global.a.b"),
    ("include variables", 'set «"global.1" "c";', "global.1"),
    # MIME
    ("foreverypart", "«break;", "foreverypart"),
    ("foreverypart", 'foreverypart :name "a" { break :name «"b"; }', "b"),
    ("foreverypart", "«foreverypart «;", "{"),
    ("foreverypart", "foreverypart «true { keep; }", "test"),
    ("mime", 'if header «:anychild "a" "b" { keep; }', ":mime"),
    ("mime", 'if header «:type "content-type" "b" { keep; }', ":mime"),
    ("mime", 'if header :mime :type «:subtype "content-type" "b" { keep; }', ":subtype"),
    ("mime", "if header :mime :param «5 { keep; }", "string"),
    ("extracttext variables foreverypart", '«extracttext "a";', "foreverypart"),
    ("extracttext variables foreverypart", 'foreverypart { extracttext :first «"5" "a"; }', "number"),
    ("extracttext variables foreverypart", 'foreverypart { extracttext «"a b"; }', "a b"),
    # others
    ("duplicate", 'if duplicate :header "a" «:uniqueid "b" { keep; }', ":uniqueid"),
    ("duplicate", 'if duplicate :seconds «"5" { keep; }', "number"),
    ("duplicate", 'if duplicate «"a" { keep; }', "duplicate"),
    ("body", 'if body :raw «:text "a" { keep; }', ":text"),
    ("body", "if body :content «5 { keep; }", "string"),
    ("spamtest", 'if spamtest «["1"] { keep; }', "string"),
    ("encoded-character fileinto", 'fileinto «"a${unicode:200000}";', "200000"),
    ("encoded-character fileinto", 'fileinto «"a${unicode:41 D800}";', "D800"),
    ("mailbox fileinto", "«fileinto :create «;", "string"),
]  # fmt: skip


def marked(script: str) -> tuple[bytes, list[str]]:
    """The script without its marks, and the places that they mark, as "line:column"."""
    places, plain = [], ""
    for part in script.split(MARK)[:-1]:
        plain += part
        places.append(f"{plain.count(chr(10)) + 1}:{len(plain) - plain.rfind(chr(10))}")
    plain += script.rpartition(MARK)[2]
    return plain.encode("utf-8", "surrogateescape"), places


@pytest.fixture
def sieve(site: Site) -> Sieve:
    return Sieve(site)


def verify_error(sieve: Sieve, script: str, *words: str) -> None:
    """Fails if the first error in the script is at another place, or does not say these words."""
    octets, places = marked(script)
    [error, *_] = sieve.check(octets) or [""]
    line, column, text = ([*error.split(":", 2), "", ""])[:3]
    assert f"{line}:{column}" in places, error
    assert all(word in text for word in words), error
    assert text.strip().isprintable()


@pytest.mark.parametrize(("capability", "others", "script"), CAPABILITIES)
def test_what_is_used_must_be_required(sieve: Sieve, capability: str, others: str, script: str) -> None:
    verify_error(sieve, script_text(others, script), capability, "require")
    octets, _ = marked(script_text(f"{others} {capability}", script))
    assert sieve.check(octets) == []


@pytest.mark.parametrize(("requires", "script", "word"), WRONG)
def test_an_error_is_reported_where_it_is(sieve: Sieve, requires: str, script: str, word: str) -> None:
    verify_error(sieve, script_text(requires, script) if requires else script, word)


RIGHT: list[str] = [
    "",
    "\n",
    " \t\r\n\r\n",
    "# only a comment",
    "# only a comment\n",
    "/* only a comment */",
    "/**/",
    "/***/keep;/* / * **/",
    "/* not /* nested */ keep;",
    "# /* not the beginning of another\nkeep;\n",
    "/* # not the beginning of another */ keep;",
    "keep;",
    "keep;keep;keep;",
    "keep\n\n\t;\n",
    "keep/* here */;# and here",
    "KEEP;\nStop;\n",
    "IF TRUE { Keep; } ELSIF FALSE { DISCARD; } Else { STOP; }",
    "keep;\r\nif true {\r\n  stop;\r\n}\r\n",
    "if true{}",
    "if true {} else {}",
    "if true {} elsif false {} elsif true {} else { if false {} }",
    "if not not not true { keep; }",
    "if allof(true){keep;}",
    "if anyof(not false,allof(true,not anyof(false,true))){keep;}",
    'if header"a""b"{keep;}',
    'if header["a"]["b"]{keep;}',
    'if header :IS "a" "b" { keep; }',
    'if header :comparator "i;octet" :contains ["a","b" , "c"]"d"{keep;}',
    'if header :contains :comparator "i;ascii-casemap" "a" "" { keep; }',
    'if header "not a name" "x" { keep; }',
    'if header "from:" "x" { keep; }',
    'if exists ["", "a b", "\u00e9"] { keep; }',
    "if size :over 0 { keep; }",
    "if size :over 2147483647 { keep; }",
    "if size :under 1K { keep; }",
    "if size :under 1M { keep; }",
    "if size :under 1G { keep; }",
    "if size :under 001k { keep; }",
    "if size :under 1m{keep;}",
    'require "fileinto";',
    'require ["fileinto"];\nrequire\n"copy"\n;',
    'require ["fileinto", "fileinto"]; require "fileinto";',
    'require ["comparator-i;octet", "comparator-i;ascii-casemap"];',
    'REQUIRE ["fileinto"];\nFileInto "x";\n',
    'require "fileinto";\nfileinto\n\n"x";',
    'require "fileinto";\nfileinto "a\nb\r\nc";\n',
    'require "fileinto";\nfileinto "\\"\\\\\\a";',
    'require "fileinto";\nfileinto "\u00e9\u20ac\U0001f600";',
    'require "fileinto";\nfileinto "a # b /* c */ ; d";',
    'require "fileinto";\nfileinto "";',
    'require "fileinto";\nfileinto "\x7f\x01\t";',
    'require "fileinto";\nfileinto text:\nx\n.\n;',
    'require "fileinto";\nfileinto text:\n.\n;',
    'require "fileinto";\nfileinto text: \t # a comment\nx\n.\n;',
    'require "fileinto";\nfileinto TEXT:\r\n..x\r\n...\r\n.x\r\n.\r\n;\r\n',
    'require "fileinto";\nfileinto text:# "\n"x\n.\n;',
    'require "fileinto";\nfileinto text:\nx # y\n/* z */\n.\n/* a */ ; # b',
    'if header "a" [text:\nx\n.\n, "b"] { keep; }',
    'require "fileinto";\nfileinto "${hex:zz} ${unicode:110000} ${a.b}";',
    'require ["fileinto", "encoded-character"];\nfileinto "${hex:zz} ${unicode:} ${hex: 41\n42 }";',
    'require ["fileinto", "variables"];\nfileinto "${} ${a b} ${1a} $ { ${a";',
    'require ["variables"];\nset "a" "";\nset "_1" "x"; set "A_B" "${a}${A}${_1}${0}${00}${9}";',
    'require ["variables"];\nset :UPPERFIRST :Lower :length :quotewildcard "a" "b";',
    'require ["variables"];\nif string ["", "b"] "a" {}',
    'require ["variables", "envelope"];\nset "p" "from";\nif envelope "${p}" "x" {}',
    'require ["date"];\nif date "received" "WEEKDAY" ["0", "6"] {}',
    'require ["date", "index"];\nif date :last :index 2 :zone "-0530" "x-date" "std11" "a" {}',
    'require ["index"];\nif address :last :index 1 :all "from" "a" {}',
    'require ["index", "editheader"];\ndeleteheader :last :index 1 "a" ["b"]; addheader "X" "";',
    'require ["imap4flags"];\nsetflag ["", "a  b", "\\\\Recent", "\u00e9", "("]; keep :flags [];'.replace("[]", '""'),
    'require ["include"];\ninclude :once :optional :global "a b.\u00e9"; return;',
    'require ["include", "variables"];\nglobal ["a"]; global "b"; set "global.c" "x";',
    'require ["foreverypart"];\nforeverypart { foreverypart :name "a" { break; break :name "a"; } break; }',
    'require ["mime"];\nif header :mime :anychild :param ["a", "b"] :contains "content-type" "c" {}',
    'require ["mime"];\nif allof (exists :anychild :mime "a", address :mime "content-from" "b") {}',
    'require ["duplicate"];\nif duplicate :last :seconds 0 :handle "" :uniqueid "a" {}',
    'require ["duplicate"];\nif duplicate :header "not a name" {}',
    'require ["body"];\nif body :content ["", "/", "a/b/c"] :comparator "i;octet" :matches "*" {}',
    'require ["environment"];\nif environment "nonesuch" "a" {}',
    'require ["relational"];\nif header :value "ge" :comparator "i;octet" "a" "b" {}',
    'require ["relational"];\nif header :count "ne" "a" "b" {}',
    (
        'require ["relational", "comparator-i;ascii-numeric"];\n'
        'if address :comparator "i;ascii-numeric" :count "lt" ["to", "cc"] ["3"] {}'
    ),
    'require ["regex"];\nif header :regex "a" ["^$", "[]a]", "[^[:alpha:]-]{1,2}|(x|)*"] {}',
    'require ["ihave"];\nif ihave ["nonesuch"] { nonesuch :tag 5 ["a"] "b" { really; } }',
    'require ["ihave"];\nif allof (ihave "nonesuch", nonesuch :tag) { stop; } else { error "${a}"; }',
    (
        'require ["mailbox", "fileinto", "copy", "imap4flags", "special-use"];\n'
        'fileinto :flags ["a", "b"] :copy :specialuse "\\\\Junk" :create "x";'
    ),
    'require ["mailbox", "special-use"];\nif allof (mailboxexists ["a"], specialuse_exists "a" ["\\\\Junk"]) {}',
    'require ["spamtestplus", "virustest"];\nif anyof (spamtest :percent "1", virustest :is "1") {}',
]


@pytest.mark.parametrize("script", RIGHT)
def test_a_script_that_looks_odd_is_right(sieve: Sieve, script: str) -> None:
    assert sieve.check(script) == []


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("text:\nx\n.\n", "x|"),
        ("text:\n..x\n...\n.x\n.\n", ".x|..|.x|"),
        ("text: # comment\r\nx\r\n\r\n.\r\n", "x||"),
        ("text:\n.\n", ""),
        ('"a\r\nb"', "a|b"),
        ('"a\\"\\\\\\b"', 'a"\\b'),
        ('"a # b"', "a # b"),
    ],
)
def test_what_a_string_stands_for(sieve: Sieve, text: str, folder: str) -> None:
    """Each line's end is a CR LF, be it written so or not; here, it is a vertical bar."""
    key = folder.replace("\\", "\\\\").replace('"', '\\"').replace("|", "${hex:0d 0a}")
    script = f'if string :comparator "i;octet" {text} "{key}" {{ discard; }}'
    outcome = sieve.run(script_text("variables encoded-character", script))
    assert outcome.errors == []
    assert outcome.is_discarded


def test_a_script_with_an_error_does_nothing_at_all(sieve: Sieve) -> None:
    """The message is in the INBOX, and the log and a file beside the script say why."""
    outcome = sieve.run('require "fileinto";\nfileinto "x";\nif true {\n  nonesuch;\n}\n')
    assert outcome.reply == "250 2.1.5"
    assert outcome.placed == {"INBOX": ""}
    [error] = outcome.errors
    assert error.startswith("4:3: ")
    assert "nonesuch" in error
    [log] = sieve.folder.glob("active*.log")
    assert "nonesuch" in log.read_text()


def test_the_log_beside_a_script_does_not_grow_for_ever(sieve: Sieve) -> None:
    for number in range(30):
        sieve.run(f'"{number}{"x" * 8000}";')
    [log] = sieve.folder.glob("active*.log")
    assert log.stat().st_size <= 65536


def test_extensions_can_be_restricted(site: Site) -> None:
    sieve = Sieve(site, sieve_extensions="fileinto envelope")
    assert sieve.check('require ["fileinto", "envelope"];') == []
    [error] = sieve.check('require ["fileinto",\n"copy"];')
    assert error.startswith("2:1: ")
    assert "copy" in error
