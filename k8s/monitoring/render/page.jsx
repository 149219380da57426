// The page of render.mjs's screenshot: window.picture is the dashboard with the results of its queries.
import {
  applyFieldOverrides,
  createTheme,
  dateTime,
  FieldType,
  getFieldDisplayValues,
  Registry,
  renderLegendFormat,
  ThemeContext,
} from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';
import { useLayoutEffect, useMemo } from 'react';
import { createRoot } from 'react-dom/client';

const { dashboard, job, from, to, step, row, header } = window.picture;
const theme = createTheme({ colors: { mode: 'light' } });
const range = { from: dateTime(from * 1000), to: dateTime(to * 1000), raw: { from: '', to: '' } };

// Grafana's libraries lack the list of field settings that its application has: register those the dashboard uses.
const settings = new Registry(() =>
  [...new Set(dashboard.panels.flatMap((panel) => settingsOf(panel.fieldConfig)))].map((id) => ({
    id,
    name: id,
    path: id.replace(/^custom\./, ''),
    isCustom: id.startsWith('custom.'),
    process: (value) => value,
    shouldApply: () => true,
  }))
);

function settingsOf(config) {
  if (!config) return [];
  const { custom = {}, ...defaults } = config.defaults;
  const overrides = config.overrides.flatMap((o) => o.properties.map((p) => p.id));
  return [...Object.keys(defaults), ...Object.keys(custom).map((key) => `custom.${key}`), ...overrides];
}

/** One frame per series, all at the same times; null where a series has no value. */
function framesOf(panel) {
  const times = [];
  for (let t = from; t <= to; t += step) times.push(t * 1000);
  return panel.targets.flatMap((target) =>
    target.result.map(({ metric, values }) => {
      const at = new Map(values.map(([t, value]) => [Math.round(t * 1000), Number(value)]));
      const name = renderLegendFormat(target.legendFormat, metric);
      const x = target.instant ? [to * 1000] : times;
      const y = target.instant ? [Number(values[0][1])] : x.map((t) => at.get(Math.round(t)) ?? null);
      return {
        refId: target.refId,
        length: x.length,
        fields: [
          { name: 'Time', type: FieldType.time, config: {}, values: x },
          {
            name: 'Value',
            type: FieldType.number,
            labels: metric,
            config: { displayNameFromDS: name },
            values: y.map((v) => (Number.isFinite(v) ? v : null)),
          },
        ],
      };
    })
  );
}

function dressed(panel) {
  return applyFieldOverrides({
    data: framesOf(panel),
    fieldConfig: panel.fieldConfig,
    fieldConfigRegistry: settings,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
}

/** One mark at the start of each interval in which a query is positive. */
const marks = dashboard.annotations.list.flatMap((annotation, i) =>
  annotation.result.flatMap(({ values }) =>
    values
      .filter(([t, value], j) => Number(value) > 0 && !(j > 0 && t - values[j - 1][0] <= step && Number(values[j - 1][1]) > 0))
      .map(([time]) => ({ time, i, color: theme.visualization.getColorByName(annotation.iconColor) }))
  )
);

/** Only Grafana's application draws annotations: here a dashed line and a triangle; simultaneous marks alternate. */
function Marks({ config }) {
  useLayoutEffect(() => {
    config.addHook('draw', ({ ctx, bbox, valToPos }) => {
      const bottom = bbox.top + bbox.height;
      ctx.save();
      ctx.setLineDash([6, 6]);
      for (const { time, i, color } of marks) {
        const x = valToPos(time * 1000, 'x', true);
        ctx.strokeStyle = ctx.fillStyle = color;
        ctx.lineDashOffset = 6 * i;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bottom);
        ctx.stroke();
        const middle = x + 10 * (i - 0.5);
        ctx.beginPath();
        ctx.moveTo(middle, bottom);
        ctx.lineTo(middle - 5, bottom + 8);
        ctx.lineTo(middle + 5, bottom + 8);
        ctx.fill();
      }
      ctx.restore();
    });
  }, [config]);
  return null;
}

function Graph({ panel, width, height }) {
  const frames = useMemo(() => dressed(panel), [panel]);
  if (!frames.length) return <div style={{ padding: 16, color: theme.colors.text.secondary }}>No data</div>;
  return (
    <TimeSeries
      frames={frames}
      timeRange={range}
      timeZone="utc"
      width={width}
      height={height}
      legend={panel.options.legend}
      options={panel.options}
    >
      {(config) => <Marks config={config} />}
    </TimeSeries>
  );
}

function Numbers({ panel, width, height }) {
  const { options } = panel;
  const values = getFieldDisplayValues({
    fieldConfig: panel.fieldConfig,
    reduceOptions: options.reduceOptions,
    data: dressed(panel),
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
  return (
    <div style={{ display: 'flex' }}>
      {values.map(({ display }, i) => (
        <BigValue
          key={i}
          value={display}
          width={width / values.length}
          height={height}
          theme={theme}
          count={values.length}
          colorMode={options.colorMode}
          graphMode={options.graphMode}
          justifyMode={options.justifyMode}
          textMode={options.textMode}
          wideLayout={options.wideLayout}
        />
      ))}
    </div>
  );
}

function Panel({ panel, width, height }) {
  const Inside = panel.type === 'stat' ? Numbers : Graph;
  return (
    <PanelChrome title={panel.title} description={panel.description} width={width} height={height} padding="sm">
      {(innerWidth, innerHeight) => <Inside panel={panel} width={innerWidth} height={innerHeight} />}
    </PanelChrome>
  );
}

function Page() {
  const column = (window.innerWidth - 8) / 24;
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ padding: '14px 16px', fontSize: 20 }}>
        {dashboard.title}
        <span style={{ marginLeft: 24, fontSize: 14, color: theme.colors.text.secondary }}>
          job {job} · all ranks · {range.from.utc().format('HH:mm')} to {range.to.utc().format('HH:mm')} UTC ·{' '}
          {dashboard.annotations.list.map(({ name, iconColor }) => (
            <span key={name} style={{ marginLeft: 12 }}>
              <span style={{ color: theme.visualization.getColorByName(iconColor) }}>▲</span> {name}
            </span>
          ))}
        </span>
      </div>
      {dashboard.panels.map((panel) => {
        const { x, y, w, h } = panel.gridPos;
        const place = { position: 'absolute', left: 8 + x * column, top: header + y * row, width: w * column - 8 };
        return (
          <div key={panel.id} style={{ ...place, height: h * row - 8 }}>
            {panel.type === 'row' ? (
              <div style={{ padding: '4px 8px', fontWeight: 500 }}>{panel.title}</div>
            ) : (
              <Panel panel={panel} width={w * column - 8} height={h * row - 8} />
            )}
          </div>
        );
      })}
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById('root')).render(<Page />);
