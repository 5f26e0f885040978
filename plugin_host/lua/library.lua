-- The functions that Backline's commands call inside Ardour, where `Session` and `Editor` are given.
-- Every command is this file followed by one call of `answer`, with its arguments written out.

local function json(value)
   if type(value) == "table" then
      local parts = {}
      if value[1] ~= nil or next(value) == nil then
         for _, item in ipairs(value) do parts[#parts + 1] = json(item) end
         return "[" .. table.concat(parts, ",") .. "]"
      end
      for key, item in pairs(value) do parts[#parts + 1] = json(tostring(key)) .. ":" .. json(item) end
      return "{" .. table.concat(parts, ",") .. "}"
   elseif type(value) == "string" then
      return '"' .. value:gsub('[%c"\\]', function(c) return string.format("\\u%04x", c:byte()) end) .. '"'
   elseif type(value) == "number" then
      return math.tointeger(value) and string.format("%d", math.tointeger(value)) or string.format("%.17g", value)
   end
   return value == nil and "null" or tostring(value)
end

-- Runs `work` and writes what it returns to `path`, in one step. `session` is the one the command is meant for.
local function answer(path, session, work)
   local here = Session:path() .. "/" .. Session:snap_name()
   local result
   if session and session ~= here then
      result = { moved = here }
   else
      local ok, value = pcall(work)
      result = ok and { value = value ~= nil and value } or { error = tostring(value) }
   end
   local file = io.open(path .. ".part", "w")
   file:write(json(result))
   file:close()
   os.rename(path .. ".part", path)
end

local function id_of(object) return object:to_stateful():id():to_s() end

local function track_of(id)
   for route in Session:get_tracks():iter() do
      if id_of(route) == id then return route:to_track() end
   end
   return nil
end

local function regions_of(track)
   local found = {}
   for region in track:playlist():region_list():iter() do
      local start = region:position():samples()
      found[#found + 1] = { region = region, first = start, last = start + region:length():samples() }
   end
   return found
end

local function touches(track, first, last)
   for _, part in ipairs(regions_of(track)) do
      if part.first < last and part.last > first then return true end
   end
   return false
end

local function first_line(path)
   local file = io.open(path, "rb")
   local line = file and file:read("a") or ""
   if file then file:close() end
   return line
end

local function look()
   local state = {
      session = Session:path() .. "/" .. Session:snap_name(),
      name = Session:name(),
      program = first_line("/proc/self/cmdline"):match("^[^%z]*") or "",
      config = ARDOUR.user_config_directory(-1),
      rate = Session:nominal_sample_rate(),
      rolling = Session:transport_rolling(),
      recording = Session:actively_recording(),
      position = Session:transport_sample(),
      length = 0,
      tracks = {},
      regions = {},
   }
   state.tempo = Temporal.TempoMap.read():quarters_per_minute_at(Temporal.timepos_t(state.position))
   for route in Session:get_tracks():iter() do
      local track = route:to_track()
      local parts = regions_of(track)
      for _, part in ipairs(parts) do state.length = math.max(state.length, part.last) end
      state.tracks[#state.tracks + 1] = {
         id = id_of(route),
         name = route:name(),
         audio = not track:to_audio_track():isnil(),
         channels = route:n_inputs():n_audio(),
         armed = track:rec_enable_control():get_value() > 0,
         muted = route:muted() or not route:active(),
         soloed = route:soloed(),
         regions = #parts,
         playlist = track:playlist():name(),
      }
   end
   local selection = Editor:get_selection()
   if not selection.time:empty() then
      state.from, state.to = selection.time:start_sample(), selection.time:end_sample()
   end
   for region in selection.regions:regionlist():iter() do
      local playlist = id_of(region:playlist())
      for route in Session:get_tracks():iter() do
         if id_of(route:to_track():playlist()) == playlist then
            local first = region:position():samples()
            state.regions[#state.regions + 1] = {
               track = id_of(route), region = id_of(region), first = first, last = first + region:length():samples()
            }
         end
      end
   end
   return state
end

-- Tempo and metre from sample `first` to `last`, and the sample where the first bar at or after `first` begins.
local function grid(first, last)
   local map = Temporal.TempoMap.read()
   local function at(sample)
      local position = Temporal.timepos_t(sample)
      local meter = map:meter_at(position)
      return map:quarters_per_minute_at(position), meter:divisions_per_bar(), meter:note_value()
   end
   local bpm, divisions, note = at(first)
   local step = math.max(Session:nominal_sample_rate() // 4, (last - first) // 20000)
   for sample = first, last - 1, step do
      local here, beats, value = at(sample)
      if math.abs(here - bpm) > 1e-6 or beats ~= divisions or value ~= note then return {} end
   end
   local bar = map:bbt_at(Temporal.timepos_t(first)).bars
   local function start(number)
      return map:sample_at_beats(map:quarters_at_bbt(Temporal.BBT_TIME(number, 1, 0)))
   end
   while start(bar) < first do bar = bar + 1 end
   return { bpm = bpm, divisions = divisions, note = note, bar = start(bar) }
end

-- The session's markers with their names, in the order of time; its start, its end and ranges are none.
local function markers()
   local found = {}
   for location in Session:locations():list():iter() do
      if location:is_mark() and not location:is_session_range() then
         found[#found + 1] = { position = location:start():samples(), name = location:name() }
      end
   end
   table.sort(found, function(a, b) return a.position < b.position end)
   return found
end

-- The files, one per channel, of what a track sounds like (or, not `sounding`, of what lies on it); none if nothing.
local function bounce(id, first, last, sounding, name)
   local track = track_of(id)
   if not track then return { gone = true } end
   local midi = track:to_audio_track():isnil()
   if midi and (not sounding or track:n_outputs():n_audio() == 0) then return { files = {} } end
   if not touches(track, first, last) then return { files = {} } end
   local endpoint = sounding and track:main_outs() or ARDOUR.LuaAPI.nil_proc()
   local region = track:bounce_range(first, last, ARDOUR.InterThreadInfo(), endpoint, false, name)
   if region:isnil() then error("the track could not be bounced") end
   local files = {}
   for channel = 0, region:to_audioregion():n_channels() - 1 do
      files[#files + 1] = region:source(channel):to_filesource():path()
   end
   return { files = files }
end

local function set(control, value) control:set_value(value, PBD.GroupControlDisposition.NoGroup) end

local function arm(id, armed)
   local track = track_of(id)
   if track then set(track:rec_enable_control(), armed and 1 or 0) end
   return track ~= nil
end

local function create(name, channels)
   local tracks = Session:new_audio_track(channels, math.max(2, channels), nil, 1, name,
      ARDOUR.PresentationInfo.max_order, ARDOUR.TrackMode.Normal, true)
   for track in tracks:iter() do return { id = id_of(track), name = track:name() } end
   error("Ardour made no track")
end

-- Brings a wav into the session, on no track yet. Ardour says nothing where it cannot: the region is not there then.
-- Its step in the undo history changes nothing but would have to be undone before what the user did last: out with it.
local function import(path)
   local known = {}
   for id in ARDOUR.RegionFactory.regions():iter() do known[id:to_s()] = true end
   local files = C.StringVector()
   files:push_back(path)
   Editor:do_import(files, Editing.ImportSerializeFiles, Editing.ImportAsRegion, ARDOUR.SrcQuality.SrcBest,
      ARDOUR.MidiTrackNameSource.SMFTrackName, ARDOUR.MidiTempoMapDisposition.SMFTempoIgnore,
      Temporal.timepos_t(0), ARDOUR.PluginInfo(), ARDOUR.Track(), false)
   for id, region in ARDOUR.RegionFactory.regions():iter() do
      if not known[id:to_s()] and region:whole_file() then
         Editor:undo(1)
         return region
      end
   end
   return nil
end

local function region_of(id)
   for route in Session:get_tracks():iter() do
      for _, part in ipairs(regions_of(route:to_track())) do
         if id_of(part.region) == id then return part.region end
      end
   end
   return nil
end

-- Places wavs as regions and mutes the regions `quiet`, as one step of the undo history; then disarms and mutes tracks.
-- items: { path, position, length, name, track = id, or channels for a new track }.
local function place(label, items, disarm, mute, quiet, careful)
   if Session:actively_recording() then return { recording = true } end
   local regions = {}
   for number, item in ipairs(items) do
      regions[number] = import(item.path)
      if not regions[number] then return { missing = number } end
   end
   -- Ardour went on living while it imported: only now is it certain what is there.
   for number, item in ipairs(items) do
      local track = item.track and track_of(item.track)
      if item.track and not track then return { gone = number } end
      if track and track:to_audio_track():isnil() then return { midi = number } end
      if track and careful and track:rec_enable_control():get_value() == 0 then return { disarmed = number } end
   end
   if Session:actively_recording() then return { recording = true } end
   if careful and Session:transport_rolling() then return { rolling = true } end
   local placed = {}
   for number, item in ipairs(items) do
      local id = item.track or create(item.name, item.channels).id
      local track = track_of(id)
      -- What lies there stays as it is, in its own playlist; the copy takes the new region on top.
      if touches(track, item.position, item.position + item.length) then track:use_copy_playlist() end
      placed[number] = { track = id }
   end
   Session:begin_reversible_command(label)
   for number, item in ipairs(items) do
      local playlist = track_of(placed[number].track):playlist()
      local region = ARDOUR.RegionFactory.clone_region(regions[number], true, false)
      region:set_name(item.name)
      playlist:to_stateful():clear_changes()
      playlist:add_region(region, Temporal.timepos_t(item.position), 1, false)
      Session:add_stateful_diff_command(playlist:to_statefuldestructible())
      placed[number].position = region:position():samples()
      placed[number].length = region:length():samples()
   end
   for _, id in ipairs(quiet) do
      local region = region_of(id)
      if region then
         region:to_stateful():clear_changes()
         region:set_muted(true)
         Session:add_stateful_diff_command(region:to_statefuldestructible())
      end
   end
   Session:commit_reversible_command(nil)
   for _, id in ipairs(disarm) do arm(id, false) end
   for _, id in ipairs(mute) do
      local track = track_of(id)
      if track then set(track:mute_control(), 1) end
   end
   return { placed = placed }
end

