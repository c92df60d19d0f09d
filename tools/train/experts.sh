#!/bin/sh
# Trains the safety adapters of weights/safety: bash tools/train/experts.sh [work folder] [output folder]
#
# The base is what run.sh left in the work folder (fp32 weights and latents); without that it is weights/emoji as it ships, from which
# the latents are drawn first.  The experts come first alone, then together; the adapter that is required is trained on all categories
# at once.  The product, which must have been built, merges and writes the manifests.  Budgets are processor time: about 30 minutes of
# two single-thread processes, and a quarter of an hour for latents.  What the work folder has already is not made again.
#   RANK=8         of each expert (4)
#   SHARE=0.03     of every budget: the whole way is tried in minutes (1)
#   ONLY=experts   leaves out what is trained on all categories at once; ONLY=merged leaves out the experts
#   JOBS=1         one process at a time (2)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(realpath -m "${1:-$root/build/train}")
out=$(realpath -m "${2:-$root/weights/safety}")
rank=${RANK:-4} share=${SHARE:-1} only=${ONLY:-all} jobs=${JOBS:-2}
x=$work/experts-$rank
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
py="$work/venv/bin/python"
safelight=$root/build/release/safelight
[ -x "$safelight" ] || { echo "experts.sh: build the product first: make" >&2; exit 2; }
mkdir -p "$x/alone" "$out/experts"
sh "$here/venv.sh" "$work"

# part COMMAND...: beside the next one, or before it when JOBS is 1; both: waits for it.
part() {
	if [ "$jobs" = 1 ]; then
		"$@"
	else
		"$@" &
		first=$!
	fi
}
both() {
	[ "$jobs" = 1 ] || wait "$first"
}

# ---- the base ----

vae=$work/vae-final unet=$work/unet text=$work/text
[ -d "$vae" ] || vae=$root/weights/emoji/vae
[ -d "$unet" ] || unet=$root/weights/emoji/unet
[ -d "$text" ] || text=$root/weights/emoji/text_encoder

latents() {
	file=$work/$1$2.npz
	[ -f "$file" ] && return
	kind=$1 number=$2
	shift 2
	$py "$here/latents.py" --vae "$vae" --canonical "$@" --part "$number" --parts 2 --out "$file.new.npz" >"$work/latents-$kind$number.log" 2>&1
	mv "$file.new.npz" "$file"
}
canonical() {
	latents c "$1" --plain 1 --pairs 6000
	latents p "$1" --plain 0 --coloured 0 --pairs 20000
}
part canonical 0
canonical 1
both
[ -f "$work/pairs.npz" ] || $py "$here/experts.py" pairs --vae "$vae" --each 20 --out "$work/pairs.npz"

# ---- training ----

# learn COMMAND LOG SECONDS OPTION...: unless its log says that it was done.
learn() {
	command=$1 log=$x/$2.log
	! grep -qs '^done:' "$log" || return 0
	seconds=$(echo "$3 $share" | awk '{ print $1 * $2 }')
	shift 3
	$py "$here/experts.py" "$command" --unet "$unet" --text "$text" --tokenizer "$root/weights/emoji/tokenizer" --pairs "$work/pairs.npz" \
		--latents "$work/c0.npz" "$work/c1.npz" "$work/p0.npz" "$work/p1.npz" --seconds "$seconds" "$@" >"$log" 2>&1 ||
		{ echo "experts.sh: $log:" >&2; tail -n 5 "$log" >&2; exit 1; }
}

slug() {
	echo "$1" | tr ' ' -
}

alone() {
	for category; do
		name=$(slug "$category")
		learn train "$name" 110 --category "$category" --rank "$rank" --out "$x/alone/$name.safetensors"
	done
}

together() {
	learn join join-1 360 --rank "$rank" --keep 60 --duels 14 --keeps 28 --lr 1e-3 --alone 0.33 --init "$x/alone" --out "$x/join-1"
	learn join join-2 330 --rank "$rank" --keep 120 --duels 14 --keeps 32 --lr 1e-3 --alone 0.2 --init "$x/join-1" --out "$x/join-2"
	learn join join-3 380 --rank "$rank" --keep 90 --duels 18 --keeps 30 --lr 1.2e-3 --alone 0.15 --pair-share 0.5 --seed 3 \
		--init "$x/join-2" --out "$out/experts"
}

everything() {
	learn train all-1 420 --category all --rank 28 --keep 60 --duels 14 --keeps 28 --out "$x/all-1.safetensors"
	learn train all-2 330 --category all --rank 28 --keep 90 --duels 16 --keeps 32 --lr 1.2e-3 --seed 2 \
		--init "$x/all-1.safetensors" --out "$x/all-2.safetensors"
	learn train all-3 380 --category all --rank 28 --keep 90 --duels 18 --keeps 30 --lr 1.2e-3 --pair-share 0.5 --seed 3 \
		--init "$x/all-2.safetensors" --out "$x/all.safetensors"
}

if [ "$only" != merged ]; then
	part alone hate harassment violence "illegal activity"
	alone self-harm sexual shocking
	both
fi
case $only in
experts) together ;;
merged) everything ;;
*)
	part everything
	together
	both
	;;
esac

# ---- what the server takes ----

# sign FILE NOTE PROMPT...
sign() {
	file=$1 note=$2
	shift 2
	for prompt; do
		set -- "$@" --prompt "$prompt"
		shift
	done
	"$safelight" adapter sign "$file" --model "$root/weights/emoji" --note "$note" "$@"
}

if [ "$only" != merged ]; then
	awk -F '\t' 'NR > 1 && !seen[$1]++ { print $1 "\t" $2 }' "$here/concepts.tsv" | while IFS="$(printf '\t')" read -r category concept; do
		name=$(slug "$category")
		sign "$out/experts/$name.safetensors" "Safety expert of the bundled model: $name, rank $rank." "a $concept" "a red apple"
	done
fi
if [ "$only" != experts ]; then
	"$safelight" adapter merge --method concat --weight all=1.15 --model "$root/weights/emoji" --out "$out/merged.safetensors" "$x/all.safetensors"
	sign "$out/merged.safetensors" "Safety of the bundled model: all seven categories, rank 28, trained at once, applied at 1.15." \
		"a bomb" "a kitchen knife on a blue background" "a pile of poo" "a red apple"
fi
tail -qn 1 "$x"/*.log
