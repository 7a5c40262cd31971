/* charts.c - the HTML pages with curves: an evaluation (`nla eval --html`) and a training run (`nla report`).
 *
 * They are pages as report.c makes them, with the same guards: everything in the data is taken as hostile. What both share
 * stands first: `chart` draws one picture (lines, marks, intervals, axes with round ticks) as SVG and answers pointer and
 * keyboard with the values at one place; then each page's style, body and script, and the function that writes it.
 */
#define _GNU_SOURCE /* open_memstream */
#include "nla.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ charts */

/* Colours that stay apart for the colour-blind, 4.5 or more from the paper; dashes and marks tell series apart as well. */
static const char chart_style[] =
    ":root {\n"
    "  --c0: #0067a8; --c1: #c24e00; --c2: #00805c; --c3: #a33c7e;\n"
    "}\n"
    "@media (prefers-color-scheme: dark) {\n"
    "  :root { --c0: #62b6ec; --c1: #f0a13c; --c2: #35c79a; --c3: #e59ac6; }\n"
    "}\n"
    ".c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }\n"
    "section { margin-top: 2.4rem; }\n"
    "section > h2 { font: 600 1.25rem/1.3 var(--serif); margin-bottom: .3rem; }\n"
    "section > p { max-width: 46rem; text-wrap: pretty; }\n"
    ".sample { display: grid; gap: .7rem 2.5rem; padding: 1.1rem 0; border-bottom: 1px solid var(--line); }\n"
    ".sample h3 span { font-weight: 400; color: var(--muted); font-variant-numeric: tabular-nums; }\n"
    ".prefix { white-space: pre-wrap; unicode-bidi: plaintext; font-size: .933rem; color: var(--muted); margin: .3rem 0 0; }\n"
    ".sample .words { white-space: pre-line; unicode-bidi: plaintext; margin: 0; }\n"
    "@media (min-width: 58rem) {\n"
    "  .sample { grid-template-columns: minmax(0, 5fr) minmax(0, 8fr); }\n"
    "}\n"
    ".charts { display: grid; gap: 0 2.5rem; margin-top: 1.2rem;\n"
    "  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }\n"
    ".charts.wide { grid-template-columns: minmax(0, 60rem); }\n"
    "figure { position: relative; display: grid; grid-row: span 4; grid-template-rows: subgrid; margin: 0 0 1.8rem;\n"
    "  min-width: 0; }\n"
    "figcaption { font-weight: 600; border-top: 2px solid var(--ink); padding-top: .35rem; }\n"
    "figure > p { margin: .3rem 0 0; }\n"
    ".readout { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; align-content: flex-start;\n"
    "  padding: .1rem 0 .5rem; font-size: .867rem; font-variant-numeric: tabular-nums; }\n"
    ".readout > * { min-width: 0; }\n"
    ".readout svg { width: 28px; height: 10px; margin-right: .35rem; vertical-align: 0; }\n"
    ".readout b { font-weight: 600; }\n"
    ".plot { display: block; width: 100%; height: auto; touch-action: pan-y; cursor: crosshair; border-radius: 2px; }\n"
    ".plot text { font: 11px var(--sans); fill: var(--muted); font-variant-numeric: tabular-nums; }\n"
    ".plot .row { fill: var(--ink); font-size: 12px; }\n"
    ".middle { text-anchor: middle; }\n"
    ".end { text-anchor: end; }\n"
    ".grid { stroke: var(--line); }\n"
    ".zero { stroke: var(--ink); stroke-width: 1.5; }\n"
    ".cursor { stroke: var(--muted); opacity: 0; }\n"
    ".plot:hover .cursor, .plot:focus-visible .cursor { opacity: 1; }\n"
    ".line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }\n"
    ".c1 .line { stroke-dasharray: 7 3; }\n"
    ".c2 .line { stroke-dasharray: 2 3; }\n"
    ".c3 .line { stroke-dasharray: 8 3 2 3; }\n"
    ".solid .line { stroke-dasharray: none; }\n"
    ".faint .line { stroke-width: 1; opacity: .32; }\n"
    ".mark { fill: var(--c); stroke: var(--paper); stroke-width: 1; }\n"
    ".range { fill: none; stroke: var(--c); stroke-width: 1.5; }\n"
    ".band { fill: var(--c); opacity: .16; }\n"
    ".unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }\n"
    "dl.headline { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1.3rem 0 0; padding: 1rem 0;\n"
    "  border: solid var(--line); border-width: 1px 0; }\n"
    ".headline dt { font-size: .867rem; }\n"
    ".headline dd { text-align: left; font: 600 1.6rem/1.2 var(--serif); }\n"
    ".headline dd + dd { font: .867rem/1.4 var(--sans); color: var(--muted); }\n";

static const char chart_script[] =
    "const real = x => typeof x === 'number' && Math.abs(x) < 1e30;\n"
    "const minus = text => text.replace(/-/g, '\\u2212');\n"
    "// A number in about four digits.\n"
    "function short(x) {\n"
    "  if (!real(x)) return '\\u2013';\n"
    "  const size = Math.abs(x), rounded = +x.toPrecision(4);\n"
    "  return minus(size >= 1e7 || size && size < 1e-3 ? rounded.toExponential().replace('e+', 'e') :\n"
    "    rounded.toLocaleString('en', {maximumFractionDigits: 7}));\n"
    "}\n"
    "function svg(tag, attributes, ...children) {\n"
    "  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);\n"
    "  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);\n"
    "  e.append(...children);\n"
    "  return e;\n"
    "}\n"
    "// Round ticks inside lo..hi, about n: multiples of 1, 2 or 5 times a power of ten, as [value, text]; whole: no fractions.\n"
    "function ticks(lo, hi, n, whole = false) {\n"
    "  const rough = (hi - lo) / Math.max(n, 1), power = 10 ** Math.floor(Math.log10(rough)), list = [];\n"
    "  const by = Math.max(whole ? 1 : 0, power * [1, 2, 5, 10].find(k => k * power >= rough * .999));\n"
    "  const digits = Math.max(0, -Math.floor(Math.log10(by) + 1e-9)), plain = digits < 5 && Math.max(-lo, hi) < 1e7;\n"
    "  for (let k = Math.ceil(lo / by - 1e-6); k * by <= hi + by * 1e-6 && list.length < 30; k++) {\n"
    "    const x = +(k * by).toPrecision(12);\n"
    "    list.push([x, minus(plain ? x.toLocaleString('en', {minimumFractionDigits: digits}) :\n"
    "      x.toExponential().replace('e+', 'e'))]);\n"
    "  }\n"
    "  return list;\n"
    "}\n"
    "// [lo, hi] of the values with a margin, never empty.\n"
    "function span(values, margin) {\n"
    "  let lo = Infinity, hi = -Infinity;\n"
    "  for (const v of values) if (real(v)) [lo, hi] = [Math.min(lo, v), Math.max(hi, v)];\n"
    "  if (lo > hi) return [0, 1];\n"
    "  const size = Math.max(Math.abs(lo), Math.abs(hi));\n"
    "  if (hi - lo <= size * 1e-9) return size ? [lo - size * .1, hi + size * .1] : [0, 1];\n"
    "  return [lo - (hi - lo) * margin, hi + (hi - lo) * margin];\n"
    "}\n"
    "const quantile = (sorted, q) => sorted[Math.round(q * (sorted.length - 1))];\n"
    "// What tells series apart besides colour: circle, square, triangle, diamond.\n"
    "function marker(shape, x, y, r) {\n"
    "  const d = [`M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0z`,\n"
    "    `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`, `M${x},${y - r * 1.2}l${r * 1.2},${r * 2.1}h${-r * 2.4}z`,\n"
    "    `M${x},${y - r * 1.4}l${r * 1.4},${r * 1.4}l${-r * 1.4},${r * 1.4}l${-r * 1.4},${-r * 1.4}z`][shape];\n"
    "  return svg('path', {class: 'mark', d});\n"
    "}\n"
    "// A line through points on the screen; where they stand closer than pixels, each pixel's lowest and highest.\n"
    "function trace(points) {\n"
    "  let kept = points;\n"
    "  if (points.length > 3000) {\n"
    "    kept = [];\n"
    "    for (let i = 0; i < points.length;) {\n"
    "      const pixel = Math.floor(points[i][0]);\n"
    "      let low = points[i], high = low;\n"
    "      for (; i < points.length && Math.floor(points[i][0]) === pixel; i++) {\n"
    "        if (points[i][1] < low[1]) low = points[i];\n"
    "        if (points[i][1] > high[1]) high = points[i];\n"
    "      }\n"
    "      kept.push(low, high);\n"
    "    }\n"
    "  }\n"
    "  return 'M' + kept.map(([x, y]) => x.toFixed(1) + ',' + y.toFixed(1)).join('L');\n"
    "}\n"
    "const textOf = s => s && typeof s.explanation === 'string' ? s.explanation : null;\n"
    "/* An example: its row, score and the end of its prefix on one side, the words on the other. */\n"
    "function sampleHead(row, score, prefix) {\n"
    "  const left = el('div', '', el('h3', '', 'Row ' + inline(String(row)) + ' ', el('span', 'small', score)));\n"
    "  if (typeof prefix === 'string') {\n"
    "    const end = [...prefix].slice(-240).join('');\n"
    "    left.append(el('p', 'prefix', (end.length < prefix.length ? '\\u2026' : '') + end.trimStart()));\n"
    "  }\n"
    "  return left;\n"
    "}\n"
    "function sampleOf(left, words) {\n"
    "  return el('article', 'sample', left, words ? el('p', 'words', ...words) : el('p', 'warning', 'Failed: no explanation.'));\n"
    "}\n"
    "/* A figure with one chart, which drawCharts fills. A point is {x, y, lo, hi, more}, lo to hi its interval, more what the\n"
    " * readout adds; series are {name, shape (0 to 3), points in order of x, line, marks, solid, faint, interval ('band', 'bar'),\n"
    " * quiet (not in the readout)}. x and y: {name, range, zero (a strong line there), names and under (of the places 0, 1, ..),\n"
    " * whole (ticks)}.\n"
    " * across: the chart lies on its side, its readout goes down the rows that y names and intervals are those of x.\n"
    " * The plot is a slider to the keyboard: its value is the place that the readout, which is also the legend, speaks of. */\n"
    "const drawings = [];\n"
    "function drawCharts() {\n"
    "  for (const draw of drawings) draw();\n"
    "}\n"
    "function chart({title, note = '', x, y, series, height = 200, across = false, place = short, value = short, start}) {\n"
    "  const key = p => across ? p.y : p.x;\n"
    "  const stops = [...new Set(series.flatMap(s => s.points.map(key)))].sort((a, b) => a - b);\n"
    "  const readout = el('div', 'readout'), plot = svg('svg', {class: 'plot', role: 'slider', tabindex: 0});\n"
    "  const figure = el('figure', '', el('figcaption', '', title), readout, plot);\n"
    "  let rest = start === undefined ? stops.length - 1 : stops.findIndex(s => s >= start);\n"
    "  if (rest < 0) rest = stops.length - 1;\n"
    "  let at = rest, cursor = null, outside = false, sx, sy, inner;\n"
    "  const all = series.flatMap(s => s.points);\n"
    "  // Values of single steps may leave the picture when a few of them would flatten all others.\n"
    "  function extent() {\n"
    "    const firm = series.filter(s => !s.faint).flatMap(s => s.points);\n"
    "    const ys = firm.flatMap(p => across ? [p.y] : [p.y, p.lo, p.hi]), wild = [];\n"
    "    for (const s of series) if (s.faint) wild.push(...span(s.points.map(p => p.y), 0));\n"
    "    const loose = series.filter(s => s.faint).flatMap(s => s.points.map(p => p.y)).sort((a, b) => a - b);\n"
    "    const calm = [...ys, quantile(loose, .005), quantile(loose, .995)], full = span([...ys, ...wild], .06);\n"
    "    const cut = span(calm, .06);\n"
    "    outside = loose.length > 100 && full[1] - full[0] > 4 * (cut[1] - cut[0]);\n"
    "    return outside ? cut : full;\n"
    "  }\n"
    "  const zero = (axis, [lo, hi]) => axis.zero ? [Math.min(lo, 0), Math.max(hi, 0)] : [lo, hi];\n"
    "  const places = axis => axis.names && [-.5, axis.names.length - .5];\n"
    "  const xs = across ? span(all.flatMap(p => [p.x, p.lo, p.hi]), .04) : span(all.map(p => p.x), 0);\n"
    "  const dx = x.range || places(x) || zero(x, xs);\n"
    "  const dy = y.range || places(y) || zero(y, extent());\n"
    "  if (outside) note += ' Some single steps lie outside the picture.';\n"
    "  if (note) figure.append(el('p', 'small muted', note));\n"
    "  // The point of a series that stands at a stop, or else the last before it.\n"
    "  function pointAt(s, stop) {\n"
    "    let low = 0, high = s.points.length;\n"
    "    while (low < high) {\n"
    "      const middle = (low + high) >> 1;\n"
    "      if (key(s.points[middle]) <= stop) low = middle + 1;\n"
    "      else high = middle;\n"
    "    }\n"
    "    const p = s.points[low - 1];\n"
    "    return p && (!across || p.y === stop) ? p : null;\n"
    "  }\n"
    "  function swatch(s) {\n"
    "    const parts = [svg('g', {class: looks(s)})], [g] = parts;\n"
    "    if (s.line) g.append(svg('path', {class: 'line', d: 'M0,5H28'}));\n"
    "    if (s.marks) g.append(marker(s.shape, 14, 5, 4));\n"
    "    return svg('svg', {viewBox: '0 0 28 10', 'aria-hidden': 'true'}, ...parts);\n"
    "  }\n"
    "  const looks = s => 'c' + s.shape + (s.solid ? ' solid' : '') + (s.faint ? ' faint' : '');\n"
    "  function say() {\n"
    "    const where = stops.length ? place(stops[at]) : 'no values', spoken = [where];\n"
    "    const parts = across ? [] : [el('span', 'muted', where)];\n"
    "    for (const s of series) {\n"
    "      if (s.quiet) continue;\n"
    "      const p = pointAt(s, stops[at]);\n"
    "      if (across && !p) continue;\n"
    "      const earlier = p && key(p) !== stops[at] ? ' at ' + short(key(p)) : '';\n"
    "      const figures = p ? value(across ? p.x : p.y) : '\\u2013';\n"
    "      const more = p && real(p.lo) ? ` (${value(p.lo)} to ${value(p.hi)})` : '';\n"
    "      const last = p && p.more ? ', ' + p.more : '';\n"
    "      parts.push(el('span', '', swatch(s), (across ? where : s.name) + ' ', el('b', '', figures),\n"
    "        el('span', 'muted', more + last + earlier)));\n"
    "      spoken.push((across ? '' : s.name + ' ') + figures + more + last + earlier);\n"
    "    }\n"
    "    readout.replaceChildren(...parts);\n"
    "    readout.style.minHeight = readout.offsetHeight + 'px'; // grows but does not shrink under the pointer\n"
    "    plot.setAttribute('aria-valuenow', at);\n"
    "    plot.setAttribute('aria-valuetext', spoken.join('; '));\n"
    "  }\n"
    "  function point() {\n"
    "    say();\n"
    "    if (!inner || !stops.length) return;\n"
    "    cursor.replaceChildren();\n"
    "    const c = across ? sy(stops[at]) : sx(stops[at]), [w, h] = inner;\n"
    "    cursor.append(svg('path', {class: 'cursor', d: across ? `M0,${c}h${w}` : `M${c},0v${h}`}));\n"
    "    for (const s of series) {\n"
    "      const p = pointAt(s, stops[at]);\n"
    "      if (p && !s.quiet) cursor.append(svg('g', {class: looks(s)}, marker(s.shape, sx(p.x), sy(p.y), 5)));\n"
    "    }\n"
    "  }\n"
    "  function drawSeries(s) {\n"
    "    const g = svg('g', {class: 'series ' + looks(s)});\n"
    "    const screen = s.points.map(p => [sx(p.x), sy(p.y)]), ranged = s.points.filter(p => real(p.lo) && real(p.hi));\n"
    "    if (s.interval === 'band' && ranged.length > 1) {\n"
    "      const edge = [...ranged.map(p => [sx(p.x), sy(p.hi)]), ...ranged.map(p => [sx(p.x), sy(p.lo)]).reverse()];\n"
    "      g.append(svg('path', {class: 'band', d: trace(edge) + 'z'}));\n"
    "    }\n"
    "    if (s.line && screen.length) g.append(svg('path', {class: 'line', d: trace(screen)}));\n"
    "    if (s.interval === 'bar' || s.interval === 'band' && ranged.length === 1) {\n"
    "      const bar = p => across ? `M${sx(p.lo)},${sy(p.y) - 4}v8m0,-4H${sx(p.hi)}m0,-4v8` :\n"
    "        `M${sx(p.x)},${sy(p.lo)}V${sy(p.hi)}`;\n"
    "      g.append(svg('path', {class: 'range', d: ranged.map(bar).join('')}));\n"
    "    }\n"
    "    const size = screen.length > 60 ? 2.5 : 3.5;\n"
    "    if (s.marks || screen.length === 1) g.append(...screen.map(at => marker(s.shape, ...at, size)));\n"
    "    return g;\n"
    "  }\n"
    "  function drawAxes(w, h, left, top) {\n"
    "    const g = svg('g', {}), letters = Math.floor((left - 8) / 7);\n"
    "    const cut = text => text.length > letters ? text.slice(0, letters - 1) + '\\u2026' : text;\n"
    "    const ys = y.names ? y.names.map((name, i) => [i, name]) : ticks(...dy, h / 38);\n"
    "    for (const [v, text] of ys) {\n"
    "      if (!y.names) g.append(svg('path', {class: 'grid', d: `M${left},${top + sy(v)}h${w}`}));\n"
    "      g.append(svg('text', {x: left - 8, y: top + sy(v) + 4, class: y.names ? 'end row' : 'end'}, cut(text)));\n"
    "    }\n"
    "    const xs = x.names ? x.names.map((name, i) => [i, name]) : ticks(...dx, w / 70, x.whole);\n"
    "    const room = w / Math.max(xs.length, 1), longest = Math.max(0, ...xs.map(t => t[1].length));\n"
    "    const every = Math.max(1, Math.ceil((longest * 6.2 + 6) / room));\n"
    "    for (const [i, [v, text]] of xs.entries()) {\n"
    "      if (!x.names) g.append(svg('path', {class: 'grid', d: `M${left + sx(v)},${top}v${h}`}));\n"
    "      if (x.names && i % every) continue;\n"
    "      const middle = Math.min(left + sx(v), left + w + 12 - text.length * 3.1); // the last stays inside\n"
    "      g.append(svg('text', {x: middle, y: top + h + 17, class: 'middle'}, text));\n"
    "      if (x.under) g.append(svg('text', {x: left + sx(v), y: top + h + 31, class: 'middle'}, x.under[i]));\n"
    "    }\n"
    "    g.append(svg('text', {x: left + w / 2, y: top + h + (x.under ? 48 : 34), class: 'middle'}, x.name));\n"
    "    if (y.zero && dy[0] <= 0 && dy[1] >= 0) g.append(svg('path', {class: 'zero', d: `M${left},${top + sy(0)}h${w}`}));\n"
    "    if (x.zero && dx[0] <= 0 && dx[1] >= 0) g.append(svg('path', {class: 'zero', d: `M${left + sx(0)},${top}v${h}`}));\n"
    "    return g;\n"
    "  }\n"
    "  drawings.push(() => {\n"
    "    readout.style.minHeight = '';\n"
    "    const width = Math.max(200, figure.clientWidth), margin = 6, top = margin, bottom = x.under ? 54 : 40;\n"
    "    const h = y.names ? y.names.length * 26 : height;\n"
    "    sy = v => across ? (v - dy[0]) / (dy[1] - dy[0]) * h : (dy[1] - v) / (dy[1] - dy[0]) * h;\n"
    "    const labels = y.names || ticks(...dy, h / 38).map(t => t[1]);\n"
    "    const left = Math.min(width * .4, Math.max(0, ...labels.map(t => t.length)) * (y.names ? 6.8 : 6.2) + 14);\n"
    "    const w = width - left - 14;\n"
    "    sx = v => (v - dx[0]) / (dx[1] - dx[0]) * w;\n"
    "    inner = [w, h];\n"
    "    cursor = svg('g', {});\n"
    "    // An SVG inside cuts off what leaves the picture; its margin leaves the marks at the edge whole.\n"
    "    const picture = svg('svg', {x: left - margin, y: 0, width: w + 2 * margin, height: h + 2 * margin},\n"
    "      svg('g', {transform: `translate(${margin},${margin})`}, ...series.map(drawSeries), cursor));\n"
    "    plot.setAttribute('viewBox', `0 0 ${width} ${h + top + bottom}`);\n"
    "    plot.replaceChildren(drawAxes(w, h, left, top), picture);\n"
    "    plot.dataset.left = left;\n"
    "    point();\n"
    "  });\n"
    "  function go(to) {\n"
    "    at = Math.max(0, Math.min(stops.length - 1, to));\n"
    "    point();\n"
    "  }\n"
    "  function seek(e) {\n"
    "    if (!inner || !stops.length) return;\n"
    "    const box = plot.getBoundingClientRect(), scale = plot.viewBox.baseVal.width / box.width;\n"
    "    const here = across ? (e.clientY - box.top) * scale - 6 : (e.clientX - box.left) * scale - plot.dataset.left;\n"
    "    const far = i => Math.abs((across ? sy : sx)(stops[i]) - here);\n"
    "    let low = 0, high = stops.length - 1;\n"
    "    while (low < high) {\n"
    "      const middle = (low + high) >> 1;\n"
    "      if ((across ? sy : sx)(stops[middle]) < here) low = middle + 1;\n"
    "      else high = middle;\n"
    "    }\n"
    "    go(low && far(low - 1) < far(low) ? low - 1 : low);\n"
    "  }\n"
    "  plot.addEventListener('pointermove', seek);\n"
    "  plot.addEventListener('pointerdown', seek);\n"
    "  plot.addEventListener('pointerleave', () => go(rest));\n"
    "  plot.addEventListener('keydown', e => {\n"
    "    const back = across ? 'ArrowUp' : 'ArrowDown', on = across ? 'ArrowDown' : 'ArrowUp';\n"
    "    const to = {ArrowLeft: at - 1, [back]: at - 1, ArrowRight: at + 1, [on]: at + 1, PageUp: at + 10, PageDown: at - 10,\n"
    "      Home: 0, End: stops.length - 1}[e.key];\n"
    "    if (to === undefined || e.ctrlKey || e.metaKey || e.altKey) return;\n"
    "    go(to);\n"
    "    rest = at; // stays when the pointer has gone\n"
    "    e.preventDefault();\n"
    "  });\n"
    "  // In words: every row of a chart on its side, else where each line starts and ends.\n"
    "  function trend({name, points}) {\n"
    "    if (!points.length) return name + ': no values';\n"
    "    if (across) return points.map(p => place(p.y) + ' ' + value(p.x)).join(', ');\n"
    "    const [first, last] = [points[0], points[points.length - 1]];\n"
    "    return `${name}: ${value(first.y)} at ${place(first.x)}, ${value(last.y)} at ${place(last.x)}`;\n"
    "  }\n"
    "  const told = el('p', 'unseen', series.filter(s => !s.quiet).map(trend).join('; ') + '.');\n"
    "  told.id = 'told' + drawings.length;\n"
    "  figure.append(told);\n"
    "  for (const [name, text] of [['aria-label', title + ', chart'], ['aria-describedby', told.id], ['aria-valuemin', 0],\n"
    "    ['aria-valuemax', Math.max(0, stops.length - 1)], ['aria-orientation', across ? 'vertical' : 'horizontal']]) {\n"
    "    plot.setAttribute(name, text);\n"
    "  }\n"
    "  say();\n"
    "  return figure;\n"
    "}\n"
    "// One figure of the first lines: its name, its value, what goes with it.\n"
    "function headline(name, value, more = '') {\n"
    "  $('headline').append(el('div', '', el('dt', '', name), el('dd', '', value), ...(more ? [el('dd', '', more)] : [])));\n"
    "}\n"
    "let drawnAt = 0;\n"
    "window.addEventListener('resize', () => {\n"
    "  if (drawnAt !== document.body.clientWidth) drawCharts();\n"
    "  drawnAt = document.body.clientWidth;\n"
    "});\n";

/* ------------------------------------------------------------------------------------------------ eval: the page */

static const char eval_style[] =
    "#table { margin-top: 1.2rem; }\n"
    "#table th:first-child { width: 8.5rem; }\n"
    "#table .n { width: 6rem; }\n"
    "@media (max-width: 72rem) {\n"
    "  #table thead { position: absolute; clip-path: inset(50%); }\n"
    "  #table tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; padding: .6rem 0;\n"
    "    border-bottom: 1px solid var(--line); }\n"
    "  #table th, #table td { border: 0; width: auto; padding: .1rem 0; text-align: left; }\n"
    "  #table td.n { width: auto; display: flex; justify-content: space-between; gap: .6rem; }\n"
    "  #table td.n::before { content: attr(data-name); color: var(--muted); }\n"
    "  #table th:first-child, #table td:last-child { grid-column: 1 / -1; width: auto; }\n"
    "}\n";

/* Both pages: the title, a line about it, the headline numbers, and the first section begun. */
#define BODY_OPENING \
    "<body>\n" \
    "<noscript><p>This page draws its data with JavaScript, which is off.</p></noscript>\n" \
    "<header>\n" \
    "<h1 id='title'></h1>\n" \
    "<p id='about' class='muted'></p>\n" \
    "</header>\n" \
    "<main>\n" \
    "<dl class='headline' id='headline'></dl>\n" \
    "<section>\n"

static const char eval_body[] =
    BODY_OPENING
    "<h2>How much the words carry</h2>\n"
    "<p class='muted'>FVE when the AR reads the AV&rsquo;s explanation, and when it reads another text in its place. The line\n"
    "across a dot is its 95% interval (bootstrap over rows). The strong line at 0 is no better than predicting the mean\n"
    "activation; 1 is a perfect reconstruction.</p>\n"
    "<div class='charts wide' id='dots'></div>\n"
    "</section>\n"
    "<section>\n"
    "<h2>Row by row</h2>\n"
    "<p class='muted'>The average hides which rows it comes from: how FVE is spread over rows, and whether it depends on where\n"
    "the token stands or on how long the explanation is.</p>\n"
    "<div class='charts' id='curves'></div>\n"
    "</section>\n"
    "<section id='samples'>\n"
    "<h2>Ten explanations</h2>\n"
    "<p class='muted'>One from the middle of each tenth of the rows, ordered by score: the best first.</p>\n"
    "<div id='list'></div>\n"
    "</section>\n"
    "<section>\n"
    "<h2>All figures</h2>\n"
    "<div id='table'></div>\n"
    "</section>\n"
    "</main>\n"
    "<footer class='small'>\n"
    "<h2>Settings</h2>\n"
    "<dl class='pairs' id='settings'></dl>\n"
    "<p class='muted'>FVE = 1 &minus; mse_nrm / var_nrm, both over the rows evaluated; &ldquo;of mean&rdquo; divides by\n"
    "the error of the constant prediction instead. A row without an explanation counts as orthogonal (mse_nrm 2).</p>\n"
    "<p class='keys muted'>On a chart: <kbd>&larr;</kbd> <kbd>&rarr;</kbd> read its values one by one &middot;\n"
    "<kbd>Home</kbd> <kbd>End</kbd> first, last</p>\n"
    "</footer>\n";

static const char eval_script[] =
    "const conditions = Object.entries(data.conditions).map(([name, c], i) => ({...c, name: inline(name), i,\n"
    "  fve: Array.isArray(c.mse) ? c.mse.map(m => real(m) ? 1 - m / data.var_nrm : NaN) : []}));\n"
    "const own = conditions[0], named = name => conditions.find(c => c.name === name && c !== own);\n"
    "const fixed = x => real(x) ? num(x, 3) : '\\u2013';\n"
    "const control = named('permuted-v');\n"
    "document.title = 'Evaluation of ' + inline(String(data.av ?? 'an AV'));\n"
    "$('title').textContent = document.title;\n"
    "$('about').textContent = 'An activation goes into words and comes back: how much of it survives, over ' +\n"
    "  many(data.rows, 'row') + ' of ' + inline(String(data.acts ?? 'a dataset')) + '.';\n"
    "headline('FVE', fixed(own.fve_nrm), `95%: ${fixed(own.low)} to ${fixed(own.high)}`);\n"
    "if (control) {\n"
    "  headline('with another row\\u2019s words', fixed(control.fve_nrm), `95%: ${fixed(control.low)} to ${fixed(control.high)}`);\n"
    "}\n"
    "headline('cosine', fixed(own.cos), 'centred ' + fixed(own.centred_cos));\n"
    "headline('failed', real(data.failed) ? num(100 * data.failed, 1) + '%' : '\\u2013', 'no explanation to read');\n"
    "headline('length', num(data.mean_tokens, 1), 'tokens on average');\n"
    "if (real(data.keyword_recall)) {\n"
    "  headline('keyword recall', fixed(data.keyword_recall), 'of another row ' + fixed(data.keyword_recall_permuted));\n"
    "}\n"
    "/* Every condition with its interval. */\n"
    "const dot = c => ({x: c.fve_nrm, y: c.i, lo: c.low, hi: c.high, more: inline(String(c.what ?? ''))});\n"
    "const dots = list => list.filter(c => real(c.fve_nrm)).map(dot);\n"
    "$('dots').append(chart({title: 'FVE of every condition', across: true, place: v => conditions[v].name, value: fixed,\n"
    "  start: 0, x: {name: 'FVE', zero: true}, y: {names: conditions.map(c => c.name)}, series: [\n"
    "    {name: own.name, shape: 0, marks: true, interval: 'bar', points: dots([own])},\n"
    "    {name: 'other texts', shape: 1, marks: true, interval: 'bar', points: dots(conditions.slice(1))}]}));\n"
    "/* The distribution over rows: share of rows at or below each FVE, on 200 places. */\n"
    "function distribution() {\n"
    "  const list = [own, ...['permuted-v', 'prefix', 'nearest'].map(named)].filter(c => c && c.fve.some(real));\n"
    "  const sorted = list.map(c => c.fve.filter(real).sort((a, b) => a - b));\n"
    "  let lo = 0, hi = 0; // 0 is always in the picture\n"
    "  for (const s of sorted) {\n"
    "    const q1 = quantile(s, .25), q3 = quantile(s, .75);\n"
    "    lo = Math.min(lo, Math.max(s[0], q1 - 1.5 * (q3 - q1)));\n"
    "    hi = Math.max(hi, s[s.length - 1]);\n"
    "  }\n"
    "  if (!(hi > lo)) hi = lo + 1;\n"
    "  const series = sorted.map((s, i) => {\n"
    "    const points = [];\n"
    "    for (let k = 0, below = 0; k <= 200; k++) {\n"
    "      const x = lo + (hi - lo) * k / 200;\n"
    "      while (below < s.length && s[below] <= x + 1e-12) below++;\n"
    "      points.push({x, y: below / s.length});\n"
    "    }\n"
    "    return {name: list[i].name, shape: i, line: true, points};\n"
    "  });\n"
    "  const outside = sorted.map((s, i) => [list[i].name, s.filter(v => v < lo).length]).filter(o => o[1]);\n"
    "  const left = outside.map(([name, n]) => many(n, 'row') + ' of ' + name).join(', ');\n"
    "  return chart({title: 'Share of rows at or below an FVE', x: {name: 'FVE of a row', range: [lo, hi], zero: true},\n"
    "    y: {range: [0, 1]}, series, start: 0, place: v => 'FVE ' + fixed(v), value: v => num(v),\n"
    "    note: 'Further right is better.' + (left ? ' Left of the axis: ' + left + '.' : '')});\n"
    "}\n"
    "/* FVE in bins of a quantity of the row, of about as many rows each; rows of one value stay together. */\n"
    "function bins(title, what, values) {\n"
    "  const rows = Array.isArray(values) ? values.map((v, i) => i).filter(i => real(values[i])) : [];\n"
    "  rows.sort((a, b) => values[a] - values[b]);\n"
    "  const n = Math.max(1, Math.min(10, Math.floor(rows.length / 10))), list = [];\n"
    "  for (let from = 0; from < rows.length;) {\n"
    "    const left = n - list.length;\n"
    "    let to = left > 1 ? from + Math.max(1, Math.round((rows.length - from) / left)) : rows.length;\n"
    "    while (to < rows.length && values[rows[to]] === values[rows[to - 1]]) to++;\n"
    "    list.push(rows.slice(from, to));\n"
    "    from = to;\n"
    "  }\n"
    "  if (!list.length) return null;\n"
    "  const name = v => v.toLocaleString('en'), first = b => values[b[0]], last = b => values[b[b.length - 1]];\n"
    "  const sum = x => x.reduce((a, b) => a + b, 0);\n"
    "  const series = [own, control].filter(Boolean).map((c, shape) => ({name: c.name, shape, line: true, marks: true,\n"
    "    interval: 'bar', points: list.map((bin, x) => {\n"
    "      const fve = bin.map(i => c.fve[i]).filter(real), mean = sum(fve) / fve.length;\n"
    "      const spread = 1.96 * Math.sqrt(sum(fve.map(v => (v - mean) ** 2)) / (fve.length - 1) / fve.length);\n"
    "      return {x, y: mean, lo: mean - spread, hi: mean + spread};\n"
    "    }).filter(p => real(p.y))}));\n"
    "  return chart({title, series, value: fixed, place: v => what + ' ' + name(first(list[v])) +\n"
    "    (first(list[v]) < last(list[v]) ? ' to ' + name(last(list[v])) : '') + ', ' + many(list[v].length, 'row'),\n"
    "    x: {name: 'median ' + what + ', rows below it', names: list.map(b => name(values[quantile(b, .5)])),\n"
    "      under: list.map(b => 'n ' + b.length)}, y: {zero: true}, start: 0,\n"
    "    note: 'Intervals: 95%, of the mean of the bin\\u2019s rows.'});\n"
    "}\n"
    "for (const figure of [distribution(), bins('FVE against token position', 'position', data.position),\n"
    "  bins('FVE against explanation length', 'length', data.length)]) if (figure) $('curves').append(figure);\n"
    "const samples = Array.isArray(data.samples) ? data.samples.filter(s => s && typeof s === 'object') : [];\n"
    "$('samples').hidden = !samples.length;\n"
    "for (const s of samples) {\n"
    "  const text = textOf(s);\n"
    "  $('list').append(sampleOf(sampleHead(s.row, real(s.fve) ? 'FVE ' + num(s.fve, 3) : '', s.prefix), text === null ? null : [text]));\n"
    "}\n"
    "/* The table */\n"
    "function heading(scope, name, ...children) {\n"
    "  const th = el('th', name, ...children);\n"
    "  th.scope = scope;\n"
    "  return th;\n"
    "}\n"
    "const columns = [['FVE', 'fve_nrm'], ['low', 'low'], ['high', 'high'], ['of mean', 'fve_meannorm'],\n"
    "  ['mse_nrm', 'mse_nrm'], ['cosine', 'cos'], ['centred', 'centred_cos']];\n"
    "const body = el('tbody');\n"
    "for (const c of conditions) {\n"
    "  const row = el('tr', '', heading('row', '', c.name));\n"
    "  for (const [name, key] of columns) {\n"
    "    const td = el('td', 'n', fixed(c[key]));\n"
    "    td.dataset.name = name;\n"
    "    row.append(td);\n"
    "  }\n"
    "  row.append(el('td', '', inline(String(c.what ?? ''))));\n"
    "  body.append(row);\n"
    "}\n"
    "$('table').append(el('table', '',\n"
    "  el('caption', '', 'What the AR reads, and how close it comes. Low and high: the 95% interval of FVE.'),\n"
    "  el('thead', '', el('tr', '', heading('col', '', 'Condition'), ...columns.map(c => heading('col', 'n', c[0])),\n"
    "    heading('col', '', 'The AR reads'))), body));\n"
    "listPairs($('settings'), {av: data.av, ar: data.ar, activations: data.acts, rows: data.rows, var_nrm: data.var_nrm,\n"
    "  meannorm: data.meannorm, created: data.created});\n"
    "drawCharts();\n";

/* The JSON that the page reads, `nla eval --json` (see results_json in eval.c):
 *   {"rows": int, "var_nrm": num, "failed": num, "mean_tokens": num, ..., "position": [num|null]|null, "length": [num],
 *    "samples": [{"row": int, "prefix": str|null, "explanation": str|null, "fve": num}],
 *    "conditions": {name: {"fve_nrm": num, "low": num, "high": num, ..., "what": str, "mse": [num|null]}}}
 * The first condition is the AV's own. */
int report_eval(const char *path, const char *json, size_t len, Err *err) {
    Json tree;
    if (json_parse(&tree, json, len, "the evaluation's JSON", err)) return -1;
    int conditions = json_get(&tree, 0, "conditions"), status = 0;
    double var = 0;
    bool good = json_type(&tree, conditions) == JSON_OBJECT && json_size(&tree, conditions) > 0;
    for (int k = json_first(&tree, good ? conditions : -1); k >= 0; k = json_next(&tree, k))
        good = good && json_type(&tree, k + 1) == JSON_OBJECT;
    if (!good || !json_double(&tree, json_get(&tree, 0, "rows"), &var) ||
        !json_double(&tree, json_get(&tree, 0, "var_nrm"), &var) || var <= 0)
        status = fail(err, "%s: cannot show this JSON: it has not the rows, var_nrm and conditions of `nla eval`", path);
    json_free(&tree);
    const Page page = {{chart_style, eval_style}, eval_body, {chart_script, eval_script}};
    return status ? -1 : page_write(path, &page, json, len, err);
}

/* ------------------------------------------------------------------------------------------------ a training run: the page */

static const char run_style[] =
    "#switch { position: sticky; top: 0; z-index: 1; background: var(--paper); }\n"
    "select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--muted); border-radius: 4px;\n"
    "  padding: .2rem .4rem; min-height: 2rem; max-width: 100%; }\n"
    ".sample mark { padding: 0 .1em; }\n"
    "@media print { #switch { position: static; } #switch button, #switch select { display: none; } }\n";

static const char run_body[] =
    BODY_OPENING
    "<h2>Curves</h2>\n"
    "<p class='muted' id='legend'></p>\n"
    "<div class='charts' id='curves'></div>\n"
    "</section>\n"
    "<section id='samples'>\n"
    "<h2>Explanations, evaluation by evaluation</h2>\n"
    "<p class='muted'>The same held-out rows each time: step through the evaluations and watch their explanations change.</p>\n"
    "<div class='bar' id='switch'>\n"
    "<div role='group' aria-label='Evaluation'>\n"
    "<button id='before' aria-label='Earlier evaluation'>&larr;</button>\n"
    "<select id='step' aria-label='Evaluation at step'></select>\n"
    "<button id='after' aria-label='Later evaluation'>&rarr;</button>\n"
    "</div>\n"
    "<button id='changes' aria-pressed='false'>Mark what changed</button>\n"
    "<output id='place' for='step'></output>\n"
    "</div>\n"
    "<div id='list' aria-live='polite'></div>\n"
    "</section>\n"
    "</main>\n"
    "<footer class='small'>\n"
    "<h2>Settings</h2>\n"
    "<dl class='pairs' id='settings'></dl>\n"
    "<p class='keys muted'><kbd>k</kbd> <kbd>j</kbd> earlier, later evaluation &middot; <kbd>c</kbd> mark what changed\n"
    "&middot; on a chart: <kbd>&larr;</kbd> <kbd>&rarr;</kbd> read its values one by one, <kbd>Home</kbd> <kbd>End</kbd> first,\n"
    "last</p>\n"
    "</footer>\n";

static const char run_script[] =
    "const {steps, evals} = data, known = {loss: 'Loss', fve: 'FVE', reward: 'Reward', kl: 'KL to the starting AV',\n"
    "  ar_loss: 'AR loss', policy_loss: 'Policy loss', tokens_mean: 'Tokens of an explanation', failed: 'Failed',\n"
    "  truncated: 'Truncated', skipped: 'Skipped updates', grad_norm: 'Gradient norm', lr: 'Learning rate',\n"
    "  tokens_per_s: 'Tokens per second', seconds: 'Seconds'};\n"
    "const rank = new Map(Object.keys(known).map((key, i) => [key, i]));\n"
    "function titleOf(key) {\n"
    "  return rank.has(key) ? known[key] : inline(key).replaceAll('_', ' ').replace(/^[a-z]/, c => c.toUpperCase());\n"
    "}\n"
    "const within = key => titleOf(key).replace(/^[A-Z](?![A-Z])/, c => c.toLowerCase()); // inside a line\n"
    "const held = evals.filter(e => e.eval);\n"
    "document.title = 'Training run ' + inline(data.run);\n"
    "$('title').textContent = document.title;\n"
    "const lastStep = Math.max(...[steps, evals].map(list => list.length ? list[list.length - 1].step : 0));\n"
    "$('about').textContent = many(steps.length, 'step') + ' and ' + many(held.length, 'evaluation') + ' on record, up to step ' +\n"
    "  lastStep.toLocaleString('en') + '.';\n"
    "/* The last evaluation in figures. */\n"
    "const last = held.length ? held[held.length - 1].eval : {}, lastTrain = steps[steps.length - 1] ?? {};\n"
    "headline('step', lastStep.toLocaleString('en'));\n"
    "for (const key of ['fve', 'loss', 'failed', 'tokens_mean']) {\n"
    "  const more = [], permuted = last[key + '_permuted'];\n"
    "  if (key === 'fve' && real(last.low) && real(last.high)) more.push(`${short(last.low)} to ${short(last.high)}`);\n"
    "  if (real(permuted)) more.push('permuted ' + short(permuted));\n"
    "  if (real(last[key])) headline('held-out ' + within(key), short(last[key]), more.join(', '));\n"
    "}\n"
    "if (!held.length) {\n"
    "  for (const key of ['loss', 'fve', 'reward']) {\n"
    "    if (real(lastTrain[key])) headline(within(key), short(lastTrain[key]), 'at the last step');\n"
    "  }\n"
    "}\n"
    "/* One chart for every name. What jumps from step to step (it goes up and down far more than it gets anywhere) is shown as a\n"
    " * running mean, with the steps faint behind it. */\n"
    "const stretch = Math.min(100, Math.round(steps.length / 25));\n"
    "function jumps(points) {\n"
    "  let path = 0;\n"
    "  for (let i = 1; i < points.length; i++) path += Math.abs(points[i].y - points[i - 1].y);\n"
    "  const sorted = points.map(p => p.y).sort((a, b) => a - b);\n"
    "  return stretch >= 3 && path > 4 * (quantile(sorted, .99) - quantile(sorted, .01));\n"
    "}\n"
    "function running(points) {\n"
    "  let sum = 0;\n"
    "  return points.map((p, i) => {\n"
    "    sum += p.y - (i >= stretch ? points[i - stretch].y : 0);\n"
    "    return {x: p.x, y: sum / Math.min(i + 1, stretch)};\n"
    "  });\n"
    "}\n"
    "let meant = false;\n"
    "const names = new Set();\n"
    "for (const line of steps) for (const key in line) if (key !== 'step' && real(line[key])) names.add(key);\n"
    "for (const {eval: e} of held) {\n"
    "  for (const key in e) if (real(e[key]) && !['rows', 'low', 'high'].includes(key)) names.add(key.replace(/_permuted$/, ''));\n"
    "}\n"
    "const order = [...names].sort((a, b) => (rank.get(a) ?? 1000) - (rank.get(b) ?? 1000));\n"
    "const everyStep = span([...steps, ...held].map(line => line.step), 0);\n"
    "const of = (list, get) => list.map(get).filter(p => real(p.y));\n"
    "for (const key of order) {\n"
    "  const train = of(steps, line => ({x: line.step, y: line[key]})), series = [];\n"
    "  const band = e => key === 'fve' ? {lo: e.low, hi: e.high} : {};\n"
    "  const tested = of(held, e => ({x: e.step, y: e.eval[key], ...band(e.eval)}));\n"
    "  const permuted = of(held, e => ({x: e.step, y: e.eval[key + '_permuted']}));\n"
    "  const mean = jumps(train);\n"
    "  meant ||= mean;\n"
    "  if (mean) series.push({name: 'each step', shape: 0, line: true, faint: true, quiet: true, points: train});\n"
    "  if (train.length) series.push({name: 'train', shape: 0, line: true, points: mean ? running(train) : train});\n"
    "  if (tested.length) {\n"
    "    series.push({name: 'held-out', shape: 1, line: true, solid: true, marks: true, interval: 'band', points: tested});\n"
    "  }\n"
    "  if (permuted.length) series.push({name: 'permuted', shape: 2, line: true, marks: true, points: permuted});\n"
    "  $('curves').append(chart({title: titleOf(key), series, place: v => 'step ' + v.toLocaleString('en'), height: 170,\n"
    "    x: {name: 'step', whole: true, range: everyStep}, y: {zero: key === 'fve'}}));\n"
    "}\n"
    "const controlled = held.some(e => Object.keys(e.eval).some(key => key.endsWith('_permuted')));\n"
    "const legend = [];\n"
    "if (meant) {\n"
    "  legend.push(`Train: a running mean of the last ${stretch} values where they jump, with each step faint behind it.`);\n"
    "} else if (steps.length) legend.push('Train: every step.');\n"
    "if (held.length) legend.push('Held-out: rows that are not trained on, with a 95% band where there is one.');\n"
    "if (controlled) legend.push('Permuted: the same with another row\\u2019s explanation or vector, the control.');\n"
    "if (names.has('fve')) legend.push('FVE 0 is no better than predicting the mean activation.');\n"
    "$('legend').textContent = legend.join(' ');\n"
    "/* Samples */\n"
    "const told = evals.map(e => ({step: e.step, samples: (e.samples ?? []).filter(s => s && typeof s === 'object')}))\n"
    "  .filter(e => e.samples.length);\n"
    "const rows = [...new Set(told.flatMap(e => e.samples.map(s => s.row)))];\n"
    "const find = (e, row) => e && e.samples.find(s => s.row === row);\n"
    "const state = {at: told.length - 1, changes: false};\n"
    "// The words, those marked that the earlier text has not in that order (outside the longest common subsequence).\n"
    "function compared(now, before) {\n"
    "  const parts = now.split(/(\\s+)/), words = parts.filter((_, i) => i % 2 === 0), old = before.split(/\\s+/);\n"
    "  if (words.length * old.length > 1e6) return [now];\n"
    "  const common = Array.from({length: words.length + 1}, () => new Uint16Array(old.length + 1));\n"
    "  for (let i = words.length - 1; i >= 0; i--) {\n"
    "    for (let j = old.length - 1; j >= 0; j--) {\n"
    "      common[i][j] = words[i] === old[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);\n"
    "    }\n"
    "  }\n"
    "  const out = [];\n"
    "  for (let i = 0, j = 0, mark = null; i < words.length; i++) {\n"
    "    const gap = parts[2 * i - 1] ?? '';\n"
    "    while (j < old.length && words[i] !== old[j] && common[i][j + 1] > common[i + 1][j]) j++;\n"
    "    if (j < old.length && words[i] === old[j]) {\n"
    "      out.push(gap + words[i]);\n"
    "      mark = null;\n"
    "      j++;\n"
    "    } else if (mark) mark.append(gap + words[i]);\n"
    "    else if (words[i]) out.push(gap, mark = el('mark', '', words[i]));\n"
    "    else out.push(gap);\n"
    "  }\n"
    "  return out;\n"
    "}\n"
    "function sampleView(row) {\n"
    "  const s = find(told[state.at], row), before = find(told[state.at - 1], row), now = textOf(s), old = textOf(before);\n"
    "  const score = real(s?.fve) ? 'FVE ' + num(s.fve, 3) : '';\n"
    "  const by = real(s?.fve) && real(before?.fve) ? s.fve - before.fve : NaN;\n"
    "  const change = real(by) ? ` (${by < 0 ? '' : '+'}${num(by, 3)})` : '';\n"
    "  const prefix = told.map(e => find(e, row)?.prefix).find(p => typeof p === 'string');\n"
    "  const left = sampleHead(row, score + change, prefix);\n"
    "  if (!s) return el('article', 'sample', left, el('p', 'muted', 'Not in this evaluation.'));\n"
    "  return sampleOf(left, now === null ? null : state.changes && old !== null ? compared(now, old) : [now]);\n"
    "}\n"
    "function show() {\n"
    "  const e = told[state.at];\n"
    "  $('step').value = state.at;\n"
    "  $('before').disabled = state.at === 0;\n"
    "  $('after').disabled = state.at === told.length - 1;\n"
    "  $('changes').setAttribute('aria-pressed', state.changes);\n"
    "  $('changes').disabled = state.at === 0;\n"
    "  $('place').textContent = `evaluation ${state.at + 1} of ${told.length}`;\n"
    "  $('list').replaceChildren(...rows.map(sampleView));\n"
    "  const hash = '#step=' + e.step + (state.changes ? '&changes=1' : '');\n"
    "  if (location.hash !== hash) history.replaceState(null, '', hash);\n"
    "}\n"
    "function go(to) {\n"
    "  if (!told[to]) return;\n"
    "  state.at = to;\n"
    "  show();\n"
    "}\n"
    "function mark() {\n"
    "  state.changes = !state.changes;\n"
    "  show();\n"
    "}\n"
    "function recall() {\n"
    "  const get = new URLSearchParams(location.hash.slice(1)), i = told.findIndex(e => String(e.step) === get.get('step'));\n"
    "  if (i >= 0) state.at = i;\n"
    "  if (get.get('changes') === '1') state.changes = true;\n"
    "  show();\n"
    "}\n"
    "$('samples').hidden = !told.length;\n"
    "if (told.length) {\n"
    "  for (const [i, e] of told.entries()) {\n"
    "    const option = el('option', '', 'step ' + e.step.toLocaleString('en'));\n"
    "    option.value = i;\n"
    "    $('step').append(option);\n"
    "  }\n"
    "  $('step').addEventListener('change', e => go(+e.target.value));\n"
    "  $('before').addEventListener('click', () => go(state.at - 1));\n"
    "  $('after').addEventListener('click', () => go(state.at + 1));\n"
    "  $('changes').addEventListener('click', mark);\n"
    "  document.addEventListener('keydown', e => {\n"
    "    if (e.ctrlKey || e.metaKey || e.altKey || e.target.tagName === 'SELECT') return;\n"
    "    if (e.key === 'j') go(state.at + 1);\n"
    "    else if (e.key === 'k') go(state.at - 1);\n"
    "    else if (e.key === 'c' && state.at > 0) mark();\n"
    "    else return;\n"
    "    e.preventDefault();\n"
    "  });\n"
    "  window.addEventListener('hashchange', recall);\n"
    "  recall();\n"
    "}\n"
    "listPairs($('settings'), {...data.settings, created: data.created});\n"
    "drawCharts();\n";

/* ------------------------------------------------------------------------------------------------ a training run: its files */

/* RUN/metrics.jsonl holds one JSON object a line, of two kinds:
 *   {"step": int, name: num, ...}                                              figures of one training step, any names
 *   {"step": int, "eval": {"rows": int, "fve": num, "low": num, "high": num, "fve_permuted": num, name: num, ...},
 *    "samples": [{"row": int, "prefix": str, "explanation": str|null, "fve": num|null}]}     an evaluation on held-out rows
 * where anything but "step" may be missing; of two lines of one kind and step, the later counts (a run that was resumed).
 * The page reads {"run": str, "created": str, "settings": {name: str}, "steps": [line], "evals": [line]}, in order of steps. */
typedef struct {
    int64_t step;
    bool eval;
    const char *text; /* in the mapped file */
    size_t len;
} Line;

/* Reads one line; `name` is what messages call it. */
static int read_line(Line *line, const char *name, Err *err) {
    Json tree;
    if (json_parse(&tree, line->text, line->len, name, err)) return -1;
    int eval = json_get(&tree, 0, "eval"), samples = json_get(&tree, 0, "samples"), status = 0;
    line->eval = eval >= 0 || samples >= 0;
    if (json_type(&tree, 0) != JSON_OBJECT)
        status = fail(err, "%s: not a JSON object", name);
    else if (!json_int(&tree, json_get(&tree, 0, "step"), &line->step) || line->step < 0)
        status = fail(err, "%s: has no \"step\", a whole number", name);
    else if (eval >= 0 && json_type(&tree, eval) != JSON_OBJECT)
        status = fail(err, "%s: \"eval\" is not an object", name);
    else if (samples >= 0 && json_type(&tree, samples) != JSON_ARRAY)
        status = fail(err, "%s: \"samples\" is not an array", name);
    json_free(&tree);
    return status;
}

/* The lines (stb) of the file, in its order. A last line without its newline may have been cut short: it counts if it is whole. */
static int read_lines(Line **lines, const File *file, Err *err) {
    const char *end = file->len ? file->data + file->len : NULL;
    int n = 0, status = 0;
    for (const char *at = file->data; file->len && at < end && !status;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        Line line = {.text = at, .len = (size_t)((newline ? newline : end) - at)};
        char *name = xprintf("%s, line %d", file->path, ++n);
        Err cut = {0};
        status = read_line(&line, name, newline ? err : &cut);
        if (!status) arrput(*lines, line);
        if (!newline) status = 0;
        free(name);
        at = newline ? newline + 1 : end;
    }
    return status;
}

static int by_step(const void *a, const void *b) {
    const Line *x = a, *y = b;
    if (x->eval != y->eval) return x->eval ? 1 : -1;
    if (x->step != y->step) return x->step < y->step ? -1 : 1;
    return x->text < y->text ? -1 : x->text > y->text; /* as in the file */
}

static void write_lines(FILE *out, const char *key, const Line *line, int n, bool eval) {
    bool first = true;
    fprintf(out, ", \"%s\": [", key);
    for (int i = 0; i < n; i++) {
        bool later = i + 1 < n && line[i + 1].eval == line[i].eval && line[i + 1].step == line[i].step;
        if (line[i].eval != eval || later) continue;
        fputs(first ? "\n" : ",\n", out);
        fwrite(line[i].text, 1, line[i].len, out);
        first = false;
    }
    putc(']', out);
}

/* Scalars under their dotted path. */
static void write_settings(FILE *out, const Yaml *node, const char *path, bool *first) {
    if (node->kind == YAML_SCALAR) {
        fputs(*first ? "" : ", ", out);
        json_write_string(out, path, strlen(path));
        fputs(": ", out);
        json_write_string(out, node->text, strlen(node->text));
        *first = false;
        return;
    }
    for (int i = 0; i < (int)arrlen(node->item); i++) {
        char *name = node->kind == YAML_MAP ? xstrdup(node->key[i]) : xprintf("%d", i), *dotted = xprintf("%s.%s", path, name);
        write_settings(out, node->item[i], *path ? dotted : name, first);
        free(name);
        free(dotted);
    }
}

/* The page's data; NULL when memory runs out. */
static char *run_json(const char *run, const Yaml *settings, const Line *line, size_t *len) {
    char *text = NULL, date[32];
    FILE *out = open_memstream(&text, len);
    if (!out) return NULL;
    bool first = true;
    page_date(date);
    fputs("{\"settings\": {", out);
    write_settings(out, settings, "", &first);
    fputs("}", out);
    json_text(out, "run", run);
    json_text(out, "created", date);
    write_lines(out, "steps", line, (int)arrlen(line), false);
    write_lines(out, "evals", line, (int)arrlen(line), true);
    fputs("}\n", out);
    if (!fclose(out)) return text;
    free(text);
    return NULL;
}

int report_run(const char *path, const char *run, Err *err) {
    char *settings_path = xprintf("%s/settings.yaml", run), *metrics_path = xprintf("%s/metrics.jsonl", run), *json = NULL;
    File metrics = {0};
    Line *line = NULL;
    size_t len = 0;
    Yaml *settings = yaml_load(settings_path, err);
    int status = settings ? file_map(&metrics, metrics_path, err) : -1;
    if (!status) status = read_lines(&line, &metrics, err);
    if (!status && !arrlen(line))
        status = fail(err, "%s: holds no whole line yet: the run has not finished its first step", metrics_path);
    if (!status) {
        qsort(line, arrlenu(line), sizeof *line, by_step);
        json = run_json(run, settings, line, &len);
        const Page page = {{chart_style, run_style}, run_body, {chart_script, run_script}};
        status = json ? page_write(path, &page, json, len, err) : fail(err, "%s: not enough memory to make the page", path);
    }
    free(json);
    arrfree(line);
    file_unmap(&metrics);
    yaml_free(settings);
    free(settings_path);
    free(metrics_path);
    return status;
}

int run_report(const Settings *s, Err *err) {
    const char *run = s->argument[0];
    char *path = s->html ? xstrdup(s->html) : xprintf("%s/report.html", run);
    int status = report_run(path, run, err);
    if (!status) puts(path);
    free(path);
    return status;
}
