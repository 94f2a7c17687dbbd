"""Chat templates that try to hang, fill, end or read the process, and what a user is told."""

# Kind -> Jinja source, and a part of the one line that names it.
HOSTILE = {
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "more than",
    ),
    "nested loops with output": (
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "more than",
    ),
    "loops with a condition": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "more than",
    ),
    "recursive macro": ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "nested too deeply"),
    "exponential macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "more than",
    ),
    "recursive loop": (
        "{% for a in [[[]]] recursive %}{{ loop([a, a]) }}{% endfor %}",
        "",
    ),
    "recursive block": ("{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}", "nested too deeply"),
    "product of text": ("{{ 'x' * 10**9 }}", "more than"),
    "product of text of the messages": ("{{ messages[0]['content'] * 10**9 }}", "more than"),
    "product of a list": ("{{ ([0] * 10**9) | length }}", "more than"),
    "power": ("{{ 10 ** (10 ** 9) }}", "more than"),
    "power in steps": (
        "{% set n = namespace(v=9) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}",
        "more than",
    ),
    "percent width": ("{{ '%1000000000d' % 1 }}", "more than"),
    "percent precision": ("{{ '%.1000000000f' % 1.5 }}", ""),
    "format width": ("{{ '{:>1000000000}'.format('a') }}", "more than"),
    "format filter": ("{{ '%1000000000s' | format('a') }}", "more than"),
    "format of an attribute": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "date width": ("{{ strftime_now('%1000000000d') }}", ""),
    "center filter": ("{{ 'a' | center(1000000000) }}", "more than"),
    "ljust method": ("{{ 'a'.ljust(1000000000) }}", "more than"),
    "zfill method": ("{{ 'a'.zfill(1000000000) }}", "more than"),
    "expandtabs method": ("{{ '\\t'.expandtabs(1000000000) }}", "more than"),
    "indent filter": ("{{ 'a\nb' | indent(1000000000) }}", "more than"),
    "replace twice": (
        "{{ ('x' * 99999) | replace('x', 'y' * 99999) | length }}",
        "more than",
    ),
    "join": ("{{ range(99999) | join('y' * 99999) }}", "more than"),
    "wordwrap": ("{{ ('x' * 99999) | wordwrap(1, wrapstring='y' * 99999) }}", "more than"),
    "doubling by +": (
        "{% set n = namespace(v='x') %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
        "more than",
    ),
    "doubling by ~": (
        "{% set n = namespace(v='x') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
        "more than",
    ),
    "doubling of lists": (
        "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = [n.v, n.v] %}{% endfor %}"
        "{{ n.v | string | length }}",
        "more than",
    ),
    "comparison of doubled lists": (
        "{% set n = namespace(v=[1], w=[1]) %}{% for i in range(60) %}{% set n.v = [n.v, n.v] %}"
        "{% set n.w = [n.w, n.w] %}{% endfor %}{{ n.v == n.w }}",
        "more than",
    ),
    "json indent": ("{{ [1, [2]] | tojson(indent=1000000000) }}", "more than"),
    "round": ("{{ 1.5 | round(1000000000, 'ceil') }}", "more than"),
    "lorem ipsum": ("{{ lipsum(n=1000000000) }}", ""),
    "batch": ("{{ [1] | batch(1000000000, 0) | list | length }}", "more than"),
    "slice": ("{{ [1] | slice(1000000000) | list | length }}", "more than"),
    "set block": (
        "{% set n = namespace(v='x') %}{% for i in range(60) %}{% set b %}{{ n.v }}{{ n.v }}{% endset %}"
        "{% set n.v = b %}{% endfor %}",
        "more than",
    ),
    "much output": ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "writes more than"),
    "deep brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "deep conditions": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, ""),
    "slow search": ("{{ ('a' * 99999) | urlize | striptags | wordcount }}" * 99, ""),
    "include": ("{% include '/etc/passwd' %}", "includes another file"),
    "import": ("{% import '/etc/passwd' as p %}", "includes another file"),
    "from import": ("{% from 'x.jinja' import y %}", "includes another file"),
    "extends": ("{% extends 'x.jinja' %}", "includes another file"),
    "class of a text": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "attr filter": ("{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}", ""),
    "globals of a function": ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "globals of a macro": ("{{ cycler.__init__.__globals__.os.environ }}", "unsafe"),
    "clock's self": ("{{ strftime_now.__self__.__class__.today() }}", "unsafe"),
    "namespace with a class": ("{{ namespace(__class__=1) }}", "no attribute"),
    "change of a message": ("{{ messages.append(1) }}", "unsafe"),
    "environment": ("{{ environ['HOME'] }}", "undefined"),
    "long refusal": ("{{ raise_exception('no\n' * 99999) }}", "no no no"),
    "not closed": ("{% for m in messages %}", "Unexpected end"),
    "division by zero": ("{{ 1 // 0 }}", "zero"),
}
