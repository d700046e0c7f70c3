#!/usr/bin/env bash
# Prefect server, work pool, worker and Darkroom's deployments on this machine, until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

port=${PORT:-4200}
export DARKROOM_HOME=$PWD
export PREFECT_HOME=${PREFECT_HOME:-$PWD/out/prefect}
export PREFECT_API_URL=http://127.0.0.1:$port/api
export PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
mkdir -p "$PREFECT_HOME"

answers() {  # without curl, which a fresh machine may lack
  python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$PREFECT_API_URL/health" 2>/dev/null
}

if answers; then
  echo "something already answers on port $port; choose another: PORT=4300 make serve" >&2
  exit 1
fi

trap 'trap - EXIT INT TERM; kill $(jobs -p) 2>/dev/null; wait' EXIT INT TERM
prefect server start --host 127.0.0.1 --port "$port" >"$PREFECT_HOME/server.log" 2>&1 &
server=$!
until answers; do
  kill -0 $server 2>/dev/null || { echo "the server did not start:" >&2; tail -20 "$PREFECT_HOME/server.log" >&2; exit 1; }
  sleep 0.5
done

prefect work-pool create darkroom --type process --overwrite >/dev/null
prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all >"$PREFECT_HOME/deploy.log" 2>&1 ||
  { cat "$PREFECT_HOME/deploy.log" >&2; exit 1; }
automation="Crash vanished Darkroom runs"  # the one in automations.yaml; `create` would add a second one
prefect automation inspect "$automation" >/dev/null 2>&1 ||
  prefect automation create --from-file deployments/automations.yaml >>"$PREFECT_HOME/deploy.log" 2>&1 ||
  { cat "$PREFECT_HOME/deploy.log" >&2; exit 1; }

cat <<EOF

  Darkroom is ready:  http://127.0.0.1:$port/deployments

  'on-demand'  starts a run from its form (Run → Custom run)
  'nightly'    runs every night at 02:00 UTC and makes new images each time
  logs         ${PREFECT_HOME#"$PWD"/}/server.log
  stop         Ctrl-C

EOF
prefect worker start --pool darkroom --limit 1
