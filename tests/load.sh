#!/bin/bash
# load.sh BINARY - the real daemon with two devices under a small mixed load, for builds with sanitizers: pictures side by side, bad requests,
# clients that go away, a full queue, durable jobs with their events, A1111's clients with first pictures, interrupts and skips, requests of several pictures that
# are cut, a tenant's limits, streams that nobody reads to their end, the web page, metrics, an operator's requests, swaps of the safety adapters, uploads, styles
# composed over them, and SIGTERM while pictures are drawn. Passes when every answer has an expected status, the daemon ends with status 0, and no sanitizer has
# said anything. Called by `tests/run san`.
set -u
cd "$(dirname "$0")/.."
bin=$1
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill -9 "$pid" 2>/dev/null; rm -rf "$dir"' EXIT

fail() {
  echo "load: $*"
  cat "$dir/server.log"
  grep -A 30 -m 3 'WARNING: .*Sanitizer\|ERROR: .*Sanitizer\|runtime error' "$dir/server.log" # again, at the end, where it is found
  exit 1
}

.venv/bin/python tests/wire/adapters.py "$dir/policy" || exit 1

# One computing thread: gcc's OpenMP runtime is not built for ThreadSanitizer, which then sees races in every parallel loop.
# The daemon's own threads are all there: two devices, with a thread each, and what they share.
OMP_NUM_THREADS=1 "$bin" serve --port 0 --devices 0,1 --threads 1 --queue 3 --running 2 --max_size 128 --drain_s 60 --policy "$dir/policy/policy.json" --state "$dir/state" >"$dir/server.log" 2>&1 &
pid=$!
for _ in $(seq 600); do
  url=$(sed -n 's,^ready: open \(http://[^ ]*\)/ or$,\1,p' "$dir/server.log")
  [ -z "$url" ] || break
  kill -0 $pid 2>/dev/null || fail 'the daemon ended before it was ready'
  sleep 0.2
done
[ -n "$url" ] || fail 'the daemon was not ready after two minutes'

# ask NAME EXPECTED CURL-ARGUMENT...: the status must match the expression. Runs in the background; see settle.
ask() {
  local name=$1 want=$2 got
  shift 2
  got=$(curl -s -o "$dir/$name.out" -w '%{http_code}' --max-time 120 "$@")
  [[ $got =~ ^($want)$ ]] || { echo "$name: status $got, wanted $want" >>"$dir/wrong"; head -c 300 "$dir/$name.out" >>"$dir/wrong"; }
}
draw() { # draw NAME EXPECTED JSON [CURL-ARGUMENT...]
  local name=$1 want=$2 body=$3
  shift 3
  ask "$name" "$want" -H 'Content-Type: application/json' -d "$body" "$@" "$url/v1/images/generations"
}
manage() { # manage NAME EXPECTED PATH [CURL-ARGUMENT...]: the operator's listener
  local name=$1 want=$2 path=$3
  shift 3
  ask "$name" "$want" --unix-socket "$dir/state/admin.sock" "$@" "http://admin/v1/$path"
}
settle() { # waits for the clients, not for the daemon
  [ ${#clients[@]} = 0 ] || wait "${clients[@]}" # without names it would wait for the daemon too
  clients=()
  [ ! -s "$dir/wrong" ] || fail "$(cat "$dir/wrong")"
}
# until_it WHAT COMMAND...: waits until the command succeeds.
until_it() {
  local what=$1
  shift
  for _ in $(seq 600); do
    ! "$@" || return 0
    kill -0 $pid 2>/dev/null || fail 'the daemon has ended'
    sleep 0.1
  done
  fail "waited a minute for $what"
}
# Whose clients have gone may be drawn for a moment more: only then is there room for as many as the queue has places.
is_idle() {
  curl -s --unix-socket "$dir/state/admin.sock" http://admin/v1/admin/activity | grep -q '"active":0[,}]'
}
clients=()
small='"steps":2,"size":"64x64"'

draw first 200 "{\"prompt\":\"a red apple\",$small,\"seed\":1}"
ask page 200 "$url/"
ask health 200 "$url/healthz"
ask ready 200 "$url/readyz"
ask models 200 "$url/v1/models"
ask nothing 404 "$url/nothing"
ask method 405 -X DELETE "$url/v1/models"
draw malformed 400 '{"prompt":'
draw utf8 400 $'{"prompt":"\xff"}'
draw bounds 400 '{"prompt":"x","steps":100000}'
ask type 415 -H 'Content-Type: text/plain' -d '{"prompt":"x"}' "$url/v1/images/generations"
head -c 600000 /dev/zero | tr '\0' a | ask big 413 -H 'Content-Type: application/json' --data-binary @- "$url/v1/images/generations"
settle

# more than the queue holds, samplers and forms mixed; some of the clients hang up
for i in 1 2 3 4 5 6 7 8; do
  sampler=$(sed -n "$((i % 4 + 1))p" <<<$'ddim\neuler\neuler_a\ndpmpp_2m')
  draw "many$i" '200|429' "{\"prompt\":\"a (blue:1.2) cat $i\",$small,\"seed\":$i,\"sampler\":\"$sampler\",\"negative_prompt\":\"dog\"}" &
  clients+=($!)
  manage "status$i" 200 admin/status &
  clients+=($!)
  manage "reload$i" 200 admin/reload -X POST &
  clients+=($!)
  manage "audit$i" 200 "admin/audit?n=$i" &
  clients+=($!)
  manage "activity$i" 200 admin/activity &
  clients+=($!)
  curl -s -o /dev/null --max-time 0.$i -H 'Content-Type: application/json' -H 'Accept: image/png' \
    -d "{\"prompt\":\"gone $i\",\"steps\":50,\"size\":\"64x64\"}" "$url/v1/images/generations" &
  clients+=($!)
done
settle
until_it 'those whose clients have left' is_idle
draw again 200 "{\"prompt\":\"a red apple\",$small,\"seed\":1}"
cmp -s <(tr , '\n' <"$dir/first.out" | grep b64_json) <(tr , '\n' <"$dir/again.out" | grep b64_json) ||
  fail 'the same request gave another picture after the load'
for device in 0 1; do
  curl -s "$url/metrics" | grep -q "^safelight_steps_total{device=\"$device\"} [1-9]" || fail "device $device drew nothing"
done

# durable jobs: read to their end by one, left by another, cancelled, asked for while they are drawn
for i in 1 2 3 4; do
  job=$(curl -s --max-time 120 -H 'Content-Type: application/json' -d "{\"prompt\":\"a cat $i\",$small,\"seed\":$i,\"partial_images\":1}" "$url/v1/jobs" |
    sed -n 's/.*"id":"\(job_[0-9a-f]*\)".*/\1/p')
  [ -n "$job" ] || fail 'a job was not accepted'
  ask "events$i" 200 "$url/v1/jobs/$job/events" &
  clients+=($!)
  curl -s -o /dev/null --max-time 0.$i "$url/v1/jobs/$job/events" &
  clients+=($!)
  ask "job$i" 200 "$url/v1/jobs/$job" &
  clients+=($!)
  [ $((i % 2)) = 1 ] || ask "cancel$i" '200|202' -X DELETE "$url/v1/jobs/$job" &
  clients+=($!)
done
settle
for i in 1 3; do
  grep -q '^event: result$' "$dir/events$i.out" || fail "job $i was not finished: $(tail -c 300 "$dir/events$i.out")"
  ask "picture$i" 200 "$url$(sed -n 's,.*"url":"\(/v1/jobs/[^"]*\)".*,\1,p' "$dir/events$i.out" | tail -n 1)"
done
settle

# requests of several pictures, more than are drawn at once: interrupted, skipped, left; what they share goes with the last of them
for i in 1 2 3 4 5 6; do
  ask "several$i" '200|429' -H 'Content-Type: application/json' -d "{\"prompt\":\"a cat $i\",\"steps\":6,\"width\":64,\"height\":64,\"batch_size\":4,\"seed\":$i}" \
    "$url/sdapi/v1/txt2img" &
  clients+=($!)
  curl -s -o /dev/null --max-time 0.$i -H 'Content-Type: application/json' -d "{\"prompt\":\"gone $i\",$small,\"n\":4}" "$url/v1/images/generations" &
  clients+=($!)
  sleep 0.3
  ask "end$i" 200 -X POST "$url/sdapi/v1/$([ $((i % 2)) = 0 ] && echo interrupt || echo skip)"
done
settle

# previews that are encoded while their pictures come to their end
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do
  ask "stream$i" "200|429" -N -H 'Content-Type: application/json' "$url/v1/images/generations" \
    -d "{\"prompt\":\"a tree $i\",$small,\"seed\":$i,\"stream\":true,\"partial_images\":1}" &
  clients+=($!)
  [ $((i % 4)) != 0 ] || settle
done

# A1111's clients: first pictures, progress, interrupt and skip, while somebody looks at the metrics and at the operator's page
until_it 'the streams to end' is_idle
look() { # look COMMAND...: again and again, until somebody has seen enough
  while [ -e "$dir/server.log" ] && [ ! -e "$dir/seen-enough" ]; do
    "$@"
    sleep 0.1
  done
}
look_as_operator() {
  ask scrape 200 "$url/metrics"
  manage page 200 admin/activity
}
look_as_client() {
  ask progress 200 "$url/sdapi/v1/progress"
  ask waits 200 "$url/queue/status"
  ask usage 200 "$url/sdapi/v1/system-info/status?full=true"
}
a1111() { # a1111 NAME EXPECTED ROUTE JSON [CURL-ARGUMENT...]
  local name=$1 want=$2 route=$3 body=$4
  shift 4
  ask "$name" "$want" -H 'Content-Type: application/json' -d "$body" "$@" "$url/sdapi/v1/$route"
}
is_drawn() { # is_drawn: a step of the job at hand, at least
  curl -s "$url/sdapi/v1/progress?skip_current_image=true" | grep -q '"sampling_step":[1-9]'
}
picture=$(tr , '\n' <"$dir/first.out" | sed -n 's/.*"b64_json":"\([^"]*\)".*/\1/p')
base64 -d <<<"$picture" >"$dir/picture.png"
side='"width":64,"height":64'
first="\"init_images\":[\"$picture\"],$side"
look look_as_operator & lookers=($!)
look look_as_client & lookers+=($!)
for i in 1 2 3; do
  a1111 "img$i" 200 img2img "{\"prompt\":\"a dog\",$first,\"steps\":8,\"denoising_strength\":0.5,\"batch_size\":$i,\"seed\":$i}" &
  clients+=($!)
done
settle
until_it 'the first pictures' is_idle
ask edit 200 -F image=@"$dir/picture.png" -F prompt='a dog' -F size=64x64 -F steps=2 "$url/v1/images/edits" &
clients+=($!)
for i in 1 2; do # whose clients leave while they are read, or soon after
  curl -s -o /dev/null --max-time 0.0$((4 * i)) -H 'Content-Type: application/json' \
    -d "{\"prompt\":\"gone\",$first,\"steps\":50}" "$url/sdapi/v1/img2img" &
  clients+=($!)
done
settle
a1111 broken 400 img2img "{\"prompt\":\"x\",\"init_images\":[\"bm8gcGljdHVyZQ==\"],$side}"
until_it 'those whose clients have left' is_idle
interrupt() {
  a1111 interrupt 200 interrupt '{}'
  is_idle
}
for round in 1 2; do
  a1111 "cut$round" 200 txt2img "{\"prompt\":\"a cat\",$side,\"steps\":100,\"batch_size\":3}" &
  clients+=($!)
  until_it 'a step' is_drawn
  a1111 "skip$round" 200 skip '{}'
  a1111 "behind$round" 200 img2img "{\"prompt\":\"a cat\",$first,\"steps\":100,\"batch_size\":2}" &
  clients+=($!)
  sleep 0.3
  until_it 'what is interrupted' interrupt
  settle
done

# a tenant who may have one picture at a time; streams whose readers leave when they have seen something
anna=(-H 'Authorization: Bearer anna-key-0123456789' -H 'Content-Type: application/json')
stream="\"prompt\":\"a tree\",\"size\":\"64x64\",\"steps\":150,\"stream\":true,\"partial_images\":3"
for i in 1 2; do
  curl -sN -o "$dir/leaves$i.out" "${anna[@]}" "$url/v1/images/generations" -d "{$stream,\"seed\":$i}" &
  leaver=$!
  until_it 'a preview' test -s "$dir/leaves$i.out"
  ask "second$i" 429 "${anna[@]}" "$url/v1/images/generations" -d "{\"prompt\":\"a tree\",$small}"
  draw "keyless$i" 200 "{\"prompt\":\"a tree\",$small}"
  kill $leaver
  wait $leaver 2>/dev/null
  until_it 'the job whose reader has left' is_idle
  ask "third$i" 200 "${anna[@]}" "$url/v1/images/generations" -d "{\"prompt\":\"a tree\",$small}"
done
ask stranger 401 -H 'Authorization: Bearer nobody' -H 'Content-Type: application/json' -d "{\"prompt\":\"x\"}" "$url/v1/images/generations"
touch "$dir/seen-enough"
clients+=("${lookers[@]}")
settle

# swaps while pictures are drawn, some of them with styles over what is swapped: composed again, never drawn over what was
swap() { # swap FROM TO
  sed "s/\"adapter\": \"$1\"/\"adapter\": \"$2\"/" "$dir/policy/policy.json" >"$dir/policy/new" && mv "$dir/policy/new" "$dir/policy/policy.json"
  kill -HUP $pid
}
for i in 1 2 3 4 5 6 7 8 9 10; do
  [ $((i % 2)) = 1 ] && swap a b || swap b a
  style=$([ $((i % 3)) = 0 ] && echo wash || echo ink)
  draw "swap$i" '200|429' "{\"prompt\":\"a cat\",$small,\"seed\":$i}" &
  clients+=($!)
  draw "style$i" '200|429' "{\"prompt\":\"a cat\",$small,\"seed\":$i,\"loras\":[{\"name\":\"$style\",\"scale\":0.$i}]}" &
  clients+=($!)
  sleep 0.4
done
settle
draw gone 400 "{\"prompt\":\"x\",\"loras\":[{\"name\":\"a\",\"scale\":-1}]}"
for names in 'a b' 'b a'; do # and two that are waited for, whatever the storm came to
  before=$(grep -c 'is live$' "$dir/server.log")
  # shellcheck disable=SC2086
  swap $names
  for _ in $(seq 600); do
    [ "$(grep -c 'is live$' "$dir/server.log")" = "$before" ] || break
    sleep 0.1
  done
done
[ "$(grep -c 'is live$' "$dir/server.log")" -ge 3 ] || fail 'the swaps did not go live'
manage activate '200' admin/profiles/default/activate -X POST
manage nobody 404 admin/profiles/nobody/activate -X POST
manage upload 404 admin/adapters/nobody -H 'Content-Type: application/octet-stream' --data-binary x

# another file for the live adapter, activated and rolled back while pictures are drawn under what is live
until_it 'what the swaps have left' is_idle
upload=(-H 'Content-Type: application/octet-stream' --data-binary)
draw under 200 "{\"prompt\":\"a cat\",\"steps\":12,\"size\":\"64x64\",\"n\":4}" &
clients+=($!)
draw over 200 "{\"prompt\":\"a cat\",\"steps\":6,\"size\":\"64x64\",\"loras\":[{\"name\":\"wash\",\"scale\":0.5}]}" &
clients+=($!)
manage damaged 400 admin/adapters/a "${upload[@]}" x
manage file 200 admin/adapters/a "${upload[@]}" @"$dir/policy/ink.safetensors"
manage live 200 admin/profiles/default/activate -X POST
manage back 200 admin/profiles/default/rollback -X POST
manage retire 400 admin/adapters/a -X DELETE
settle
"$bin" audit verify --state "$dir/state" >/dev/null 2>"$dir/verify" || fail "the audit log: $(cat "$dir/verify")"

# SIGTERM under load: what was accepted is finished, what comes later is refused
for i in 1 2 3; do
  draw "last$i" '200|429|503|000' "{\"prompt\":\"a tree $i\",$small}" &
  clients+=($!)
done
sleep 0.3
kill -TERM $pid
for _ in $(seq 300); do
  ! grep -q 'stopping: ' "$dir/server.log" || break
  sleep 0.1
done
draw late '503|000' "{\"prompt\":\"late\",$small}"
settle
rc=0
wait $pid || rc=$?
pid=
[ $rc = 0 ] || fail "the daemon ended with status $rc"
! grep -qE 'Sanitizer|runtime error' "$dir/server.log" || fail 'a sanitizer spoke'
grep -c . "$dir/server.log" | sed 's/^/lines in the log of the daemon: /'
