"""Prompt weights and long prompts, by the rules that AUTOMATIC1111's web UI made common. Own code, no models.

Who uses it: gen_weighting.py. It is the executable description of what the C engine does with a prompt.

    (text)        weight * 1.1         ((text)) weight * 1.21
    (text:1.3)    weight * 1.3         also (text : 1.3 ), signs allowed: (text:-0.5)
    [text]        weight / 1.1
    \\( \\) \\[ \\] \\\\  the character itself; any other backslash disappears
    BREAK         (capital letters, a word of its own) starts a new chunk
    unclosed brackets end with the prompt; closing ones without an opening one are text; so is ":1.3)" outside of brackets

Differences from the web UI, on purpose: BREAK inside brackets breaks too (there it becomes the word "BREAK" with a negative weight);
":1.2.3)" is text and a plain closing bracket (there it is an error); digits, white space and word boundaries are ASCII ones; each chunk
of each prompt gets its own mean back (there one mean over the batch); [a:b:0.5], [a|b] and AND have no meaning beyond the brackets.
"""
import re

ROUND, SQUARE = 1.1, 1 / 1.1
CHUNK = 75  # tokens of a chunk, without start and end
BACKTRACK = 20  # how far a chunk may be cut back to its last comma

PIECES = re.compile(
    r"\\[()\[\]\\]"  # an escaped character
    r"|\\"
    r"|[(\[\])]"
    r"|:\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)"  # ":1.3)"
    r"|[^\\()\[\]:]+"
    r"|:",
    re.ASCII,
)
BREAK_WORD = re.compile(r"\s*\bBREAK\b\s*", re.ASCII)
BREAK = ["BREAK", -1]


def parse(prompt):
    """Returns [[text, weight], ...]; BREAK stands in it as ["BREAK", -1]. Neighbours of equal weight are joined."""
    segments, open_round, open_square = [], [], []

    def scale(start, factor):
        for segment in segments[start:]:
            if segment is not BREAK:
                segment[1] *= factor

    for piece in PIECES.finditer(prompt):
        text, weight = piece.group(0), piece.group(1)
        if text[0] == "\\":
            segments.append([text[1:], 1.0])
        elif text == "(":
            open_round.append(len(segments))
        elif text == "[":
            open_square.append(len(segments))
        elif weight is not None and open_round:
            scale(open_round.pop(), float(weight))
        elif text == ")" and open_round:
            scale(open_round.pop(), ROUND)
        elif text == "]" and open_square:
            scale(open_square.pop(), SQUARE)
        else:
            for i, part in enumerate(BREAK_WORD.split(text)):
                if i > 0:
                    segments.append(BREAK)
                segments.append([part, 1.0])
    for start in open_round:
        scale(start, ROUND)
    for start in open_square:
        scale(start, SQUARE)

    joined = []
    for segment in segments or [["", 1.0]]:
        if joined and segment is not BREAK and joined[-1] is not BREAK and joined[-1][1] == segment[1]:
            joined[-1][0] += segment[0]
        else:
            joined.append(segment if segment is BREAK else list(segment))
    return joined


def chunk(segments, tokenize, start, end, pad, comma):
    """Returns [(ids, weights), ...] of 77 each. `tokenize` maps a text to ids without start and end."""
    chunks, ids, weights, last_comma = [], [], [], -1

    def finish():
        nonlocal ids, weights, last_comma
        space = CHUNK - len(ids)
        tail = [end] + [pad] * space
        chunks.append(([start] + ids + tail, [1.0] + weights + [1.0] * (space + 1)))
        ids, weights, last_comma = [], [], -1

    for segment in segments:
        if segment is BREAK or segment == BREAK:
            finish()
            continue
        text, weight = segment
        for token in tokenize(text):
            if token == comma:
                last_comma = len(ids)
            elif len(ids) == CHUNK and last_comma != -1 and len(ids) - last_comma <= BACKTRACK:
                # Full, and a comma is near: what follows it moves to the next chunk.
                cut = last_comma + 1
                moved_ids, moved_weights = ids[cut:], weights[cut:]
                ids, weights = ids[:cut], weights[:cut]
                finish()
                ids, weights = moved_ids, moved_weights
            if len(ids) == CHUNK:
                finish()
            ids.append(token)
            weights.append(weight)
    if ids or not chunks:
        finish()
    return chunks


def emphasise(hidden, weights):
    """Multiply the rows of one chunk's hidden states (77, D) by their weights, then give it its old mean back."""
    before = hidden.mean()
    hidden = hidden * hidden.new_tensor(weights)[:, None]
    return hidden * (before / hidden.mean())
