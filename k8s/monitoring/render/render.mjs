// Draws ../dashboard.json with Grafana's own components (@grafana/ui) in Chromium, without a Grafana server.
//
//   npm install --ignore-scripts --no-package-lock
//   node render.mjs http://127.0.0.1:9090 JOB OUTPUT.png [UNIX_TIME]
//
// It sends the panels' queries to that Prometheus, over the job's last two hours before now or before UNIX_TIME.
// $CHROMIUM: the browser, by default chromium.
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const WIDTH = 1560;
const ROW = 38; // a grid row and the gap below it, as in Grafana
const HEADER = 56;
const POINTS = 500;

const here = dirname(fileURLToPath(import.meta.url));
const [prometheus, job, output, until] = process.argv.slice(2);
if (!output) {
  console.error('usage: node render.mjs PROMETHEUS_URL JOB OUTPUT.png [UNIX_TIME]');
  process.exit(2);
}

async function api(path, parameters) {
  const answer = await fetch(`${prometheus}/api/v1/${path}?${new URLSearchParams(parameters)}`);
  const body = await answer.json();
  if (body.status !== 'success') throw new Error(`${parameters.query}: ${body.error}`);
  return body.data.result;
}

// From the job's first to its last sample.
const now = until ? Number(until) : Date.now() / 1000;
const seen = (await api('query_range', { query: `sum(infomcr_world_size{job="${job}"})`, start: now - 7200, end: now, step: 1 }))[0];
if (!seen) throw new Error(`${prometheus} has no samples of the job ${job}`);
const from = seen.values[0][0];
const to = seen.values.at(-1)[0];
const step = Math.max(1, Math.ceil((to - from) / POINTS));

function fill(expression) {
  return expression
    .replaceAll('$__rate_interval', '20s')
    .replaceAll('$__interval', `${step}s`)
    .replaceAll('$job', job)
    .replaceAll('$rank', '.*');
}

const dashboard = JSON.parse(readFileSync(join(here, '..', 'dashboard.json'), 'utf8'));
for (const panel of dashboard.panels) {
  for (const target of panel.targets ?? []) {
    const query = fill(target.expr);
    target.result = target.instant
      ? (await api('query', { query, time: to })).map((s) => ({ ...s, values: [s.value] }))
      : await api('query_range', { query, start: from, end: to, step });
  }
}
for (const annotation of dashboard.annotations.list) {
  annotation.result = await api('query_range', { query: fill(annotation.expr), start: from, end: to, step });
}

const folder = mkdtempSync(join(tmpdir(), 'dashboard-'));
try {
  await build({
    entryPoints: [join(here, 'page.jsx')],
    outfile: join(folder, 'page.js'),
    bundle: true,
    jsx: 'automatic',
    define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
    loader: { '.svg': 'text', '.ttf': 'empty' },
    logLevel: 'error',
  });
  const data = JSON.stringify({ dashboard, job, from, to, step, row: ROW, header: HEADER });
  writeFileSync(
    join(folder, 'page.html'),
    `<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="page.css">` +
      `<div id="root"></div><script>window.picture = ${data.replaceAll('<', '\\u003c')};` +
      `window.__grafana_public_path__ = 'file://${here}/node_modules/@grafana/ui/dist/public/';</script><script src="page.js"></script>`
  );
  const rows = Math.max(...dashboard.panels.map((p) => p.gridPos.y + p.gridPos.h));
  const browser = [
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--hide-scrollbars',
    '--allow-file-access-from-files',
    '--virtual-time-budget=10000',
    `--user-data-dir=${join(folder, 'profile')}`,
    `--window-size=${WIDTH},${HEADER + rows * ROW}`,
    `--screenshot=${resolve(output)}`,
    `file://${join(folder, 'page.html')}`,
  ];
  execFileSync(process.env.CHROMIUM ?? 'chromium', browser, { stdio: 'pipe' }); // its output is part of the error if it fails
} finally {
  rmSync(folder, { recursive: true, force: true });
}
