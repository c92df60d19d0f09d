#!/bin/bash
# style.sh - the rules of CONTRIBUTING.md that a script can check, on every file that git tracks or would track. Prints
# FILE:LINE: what is wrong, and exits with 1 when there was anything. Called by `make style` and tests/run.
set -u
cd "$(dirname "$0")/.."
export LC_ALL=C
found=$(mktemp)
trap 'rm -f "$found"' EXIT

files() { # files PATTERN...: tracked and new files, not ignored ones, that exist
  git ls-files -c -o --exclude-standard -- "$@" | while IFS= read -r f; do [ ! -f "$f" ] || printf '%s\n' "$f"; done
}

# forbid WHAT REGEX FILE...: no line may match.
forbid() {
  local what=$1 regex=$2
  shift 2
  [ $# = 0 ] || grep -nHE -- "$regex" "$@" | cut -d: -f1,2 | sed "s#\$#: $what#" >>"$found"
}

mapfile -t c < <(files '*.c' '*.h' '*.cu' '*.cuh')
mapfile -t product < <(files 'base/*.[ch]' 'kernels/*.[ch]' 'models/*.[ch]' 'proto/*.[ch]' 'server/*.[ch]' ':!kernels/lab')
mapfile -t text < <(files '*.c' '*.h' '*.cu' '*.sh' '*.py' '*.md' '*.js' '*.css' '*.html' '*.yaml' Makefile .ci/run deploy tests/run tools/embed)

mapfile -t ours < <(printf '%s\n' "${c[@]}" | grep -vE '^(tools|kernels/lab)/')

# ---- words ----

forbid 'unbounded or unchecked function; see CONTRIBUTING.md' \
  '(^|[^a-zA-Z0-9_])(strcpy|stpcpy|strcat|sprintf|vsprintf|gets|strtok|atoi|atol|atoll|atof|sscanf|fscanf|scanf|alloca|tmpnam|mktemp)[[:space:]]*\(' "${ours[@]}"
forbid 'no shell below the product' '(^|[^a-zA-Z0-9_])(system|popen)[[:space:]]*\(' "${product[@]}"
forbid 'a struct has its own name; no typedef for it' 'typedef[[:space:]]+(struct|union|enum)' "${c[@]}"
forbid 'environment variables decide nothing; options are in server/config.c' '(^|[^a-zA-Z0-9_])(secure_)?getenv[[:space:]]*\(' "${product[@]}"
mapfile -t below < <(printf '%s\n' "${product[@]}" | grep -vE '^server/(main|serve)\.c$')
forbid 'only server/main.c ends the process, and serve.c at a second signal' '(^|[^a-zA-Z0-9_])(_?exit|abort|quick_exit)[[:space:]]*\(' "${below[@]}"
mapfile -t above < <(printf '%s\n' "${product[@]}" | grep -v '^kernels/')
forbid 'which backend is built is the business of kernels/' '#[[:space:]]*if.*(CUDA|NVCC|DNNL|AMX|AVX)' "${above[@]}"
forbid 'unfinished business belongs into an issue' '(TODO|FIXME)' "${c[@]}"
forbid 'fast-math deletes the checks for NaN' 'f(fast-math|inite-math-only)' Makefile
forbid 'trailing white space' '[[:space:]]+$' "${ours[@]}"
forbid 'tabs' $'\t' "${ours[@]}"
mapfile -t public < <(printf '%s\n' "${text[@]}" | grep -v '^tests/style\.sh$')
forbid 'a path of one machine' '(^|[^a-zA-Z0-9_.])(/work/|/root/|/tmp/|/home/[a-z])' "${public[@]}"

# ---- layers: server -> proto, models -> kernels -> base ----

layer() { # layer DIRECTORY FORBIDDEN...
  local dir=$1 d
  shift
  mapfile -t here < <(files "$dir/*.[ch]" ':!kernels/lab')
  for d; do forbid "$dir/ may not include $d/" "#[[:space:]]*include[[:space:]]+\"$d/" "${here[@]}"; done
}
layer base kernels models proto server tests
layer kernels models proto server tests
layer models proto server tests
layer proto kernels models server tests
layer server tests

only() { # only HEADER ALLOWED-REGEX WORDS: no other file of the product includes it
  mapfile -t here < <(printf '%s\n' "${product[@]}" | grep -vE "$2")
  forbid "$1 is the business of $3" "#[[:space:]]*include[[:space:]]+<$1" "${here[@]}"
}
only microhttpd.h '^server/(exchange\.h|admin\.c)$' 'server/exchange.h and server/admin.c'
only dnnl '^kernels/cpu/' kernels/cpu/
only sqlite3.h '^server/(db|audit_db|store_db)\.c$' 'server/db.c, audit_db.c and store_db.c'
only jansson.h '^(base/json_load\.[ch]|proto/.*|models/(adapter_inspect|adapter_scale|adapter_write|config|config_read|checkpoint|safetensors|tokenizer|manifest|manifest_write|manifest_parts)\.[ch])$' 'proto/ and the readers of a checkpoint and of adapters in models/'
only utf8proc.h '^(models/(unicode|tokenizer)\.c|proto/.*)$' 'models/unicode.c, models/tokenizer.c and proto/'
only omp.h '^kernels/' kernels/
only jpeglib.h '^proto/image_(read_)?jpeg\.c$' 'proto/image_jpeg.c and proto/image_read_jpeg.c'
only webp/ '^proto/image_(read_)?webp\.c$' 'proto/image_webp.c and proto/image_read_webp.c'
only spng.h '^proto/image_read_png\.c$' proto/image_read_png.c

# ---- sizes and headers ----

for f in "${c[@]}"; do
  awk -v f="$f" '
    NR == 1 && !/^\/\*/ { print f ":1: a file opens with a comment: what, who calls it, invariants, threads" }
    /^\{/ { start = NR }
    /^\}/ { if (start && NR - start > 151) print f ":" start ": a function of " NR - start - 1 " lines; the limit is 150"; start = 0 }
    length > 160 { print f ":" NR ": a line of " length " characters; the limit is 160" }
    END { if (NR > 800) print f ":" NR ": the limit of a file is 800 lines" }' "$f" >>"$found"
  case $f in
  *_body.h) ;; # included several times on purpose
  *.h) grep -qE '^#ifndef SAFELIGHT_[A-Z0-9_]+_H$' "$f" || echo "$f:1: no include guard SAFELIGHT_..._H" >>"$found" ;;
  esac
done
while IFS= read -r f; do
  head -n 2 "$f" | grep -qE '^(#|""").*[a-z]' || echo "$f:1: a script opens with a comment that says what it is for" >>"$found"
done < <(files '*.sh' '*.py' .ci/run deploy/install-deps tests/run tests/self/check tools/embed)

# ---- clang's opinion; gcc's comes with every build ----

if command -v clang >/dev/null; then
  for f in "${product[@]}"; do
    case $f in
    server/page.c) ;; # needs a generated file
    kernels/cuda/vendor_*) ;; # needs the vendor's headers
    *.c) printf '%s\n' "$f" ;;
    esac
  done | xargs -P "$(nproc)" -n 8 clang -fsyntax-only -fopenmp -std=c11 -D_GNU_SOURCE -I. -Itests/cudasim/include -Wall -Wextra -Wstrict-prototypes -Wmissing-prototypes \
    -Wvla -Wshadow 2>&1 | grep -E '(warning|error):' >>"$found"
fi

sort -u "$found" | head -n 200
[ ! -s "$found" ]
